"""Killed at a random moment, a command leaves a complete output or none; run again, it ends as if nothing had been."""

import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fusionpl import load_model
from fusionpl.errors import FusionError
from tests.campaign.commands import COMMANDS, LAST, Command, Running, finished, left_in

pytestmark = pytest.mark.campaign
LOGGED = "out/metrics.csv"  # written last, after the output is complete


def killed(command: Command, place: Path, seconds: float, whole: dict[str, Any]) -> str:
    """Kills a command after some seconds and goes on: what it had left."""
    running = Running(place, command.words)
    time.sleep(seconds)
    running.kill()
    assert running.wait(60) is not None
    output, left = place / "out", left_in(place)
    if output.exists() and not command.resumable:
        found = "complete"
        assert {name: left.get(name) for name in whole if name != LOGGED} == {
            name: content for name, content in whole.items() if name != LOGGED
        }
    elif (output / "model").exists():
        found = "complete"
        load_model(output)
    else:
        found = "to be resumed" if (output / LAST).is_file() else "nothing"
        with pytest.raises(FusionError):
            load_model(output)
    finished(place, command.again(place))
    assert left_in(place) == whole
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_kills(name: str, home: Path, tmp_path: Path, record_property: Any) -> None:
    count, draw = int(os.environ.get("KILLS", "13")), random.Random(name)
    command = COMMANDS[name]
    shutil.copytree(home, tmp_path / "whole")
    began = time.monotonic()
    finished(tmp_path / "whole", command.words)
    seconds, whole = time.monotonic() - began, left_in(tmp_path / "whole")
    found: Counter[str] = Counter()
    for number in range(count):
        moment, place = draw.uniform(0, seconds), tmp_path / str(number)
        shutil.copytree(home, place)
        try:
            found[killed(command, place, moment, whole)] += 1
        except BaseException as error:
            error.add_note(f"kill {number}, after {moment:.2f} of {seconds:.2f} s, in {place}")
            raise
        shutil.rmtree(place)
    print(f"\n| {name} | {count} | {found['nothing']} | {found['to be resumed']} | {found['complete']} |")
    record_property("found", dict(found))
