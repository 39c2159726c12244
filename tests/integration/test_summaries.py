"""How commands end: what was made, how long it took, where the files of Weights & Biases lie, the next command; and no
chatter of libraries before that."""

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from fusionpl.cli import evaluate, finetune, fuse, sweep, train
from fusionpl.cli.running import main
from tests.integration.runs import make_run
from tests.integration.test_train_cli import TINY

CHATTER = re.compile(
    r"wandb: |GPU available|TPU available|num_workers|Generating|Map:|Loading weights|Filter:|HPU|Seed set"
)
MADE, TOOK = r"made: \S+: .+", r"took: \d+ s"
WHERE = r"Weights & Biases: no API key, so kept offline in \S+; upload it with: wandb sync \S+"


@pytest.fixture
def parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name in ("API_KEY", "MODE", "SILENT"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("NETRC", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return [str(make_run(Path("runs") / f"seed-{seed}", seed)) for seed in (1, 2)]


def ends(run: Callable[[Sequence[str]], None], argv: Sequence[str], capfd: pytest.CaptureFixture[str]) -> list[str]:
    """Runs a command in this process; the next commands that its summary names, whose other lines are checked."""
    capfd.readouterr()
    assert main(run, argv) == 0
    shown = capfd.readouterr()
    assert CHATTER.findall(shown.out + shown.err) == []
    lines = shown.out.rstrip().splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("made: "))
    assert lines[start - 1] == ""
    made, took, *rest = lines[start:]
    assert re.fullmatch(MADE, made)
    assert re.fullmatch(TOOK, took)
    if "wandb" in argv:
        where, *rest = rest
        assert re.fullmatch(WHERE, where)
    assert all(line.startswith("next: ") for line in rest)
    return [line.removeprefix("next: ").partition("  # ")[0] for line in rest]


def arguments(command: str, name: str) -> list[str]:
    """Those of a command that is advised."""
    words = shlex.split(command)
    assert words[: words.index(name)][-2:] == ["-m", "fusionpl.cli.main"]  # as there are no scripts here
    return words[words.index(name) + 1 :]


def test_all_commands_end_alike(parents: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    cpu = ["--trainer.accelerator", "cpu", "--logger"]
    made = ["runs/fused", "runs/fused-finetuned", "runs/out", "runs/sweep", "runs/tiny/seed-0"]
    after_fusion = ends(
        fuse.run, ["--parents", *parents, "--report", "rows", "--output", made[0], *cpu, "wandb"], capfd
    )
    short = ["--trainer.max_epochs", "1", "--baselines", "false"]
    assert ends(finetune.run, ["--model", made[0], *short, *cpu, "wandb"], capfd)
    (after_evaluation,) = ends(evaluate.run, ["--models", *parents, "--output", made[2]], capfd)
    assert arguments(after_evaluation, "fuse") == ["--parents", *parents]
    (after_sweep,) = ends(sweep.run, ["--parents", *parents, "--sweep", "align.reg=0.02,0.1", *cpu, "csv"], capfd)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY | {"trainer": {"max_epochs": 1, "accelerator": "cpu"}}))
    (after_training,) = ends(train.run, ["--config", "tiny.yaml"], capfd)
    assert all(Path(folder).is_dir() for folder in made)
    # what is advised can be run as it is
    for command in [after_sweep, *(command for command in after_fusion if " fuse " in command)]:
        assert main(fuse.run, [*arguments(command, "fuse"), "--dry-run"]) == 0
    assert main(train.run, arguments(after_training, "train")) == 0
    assert Path("runs/tiny/seed-1/model").is_dir()
