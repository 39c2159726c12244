"""Every command that README.md and docs/ show is one that the program takes; those that fuse are planned on parents.

`make demo` runs the path of README.md and docs/index.md for real, `test_notebook.py` the notebook.
"""

import functools
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from jsonargparse import ArgumentParser

from fusionpl import load_config
from fusionpl.cli import fuse
from fusionpl.cli.alternatives import compared
from fusionpl.cli.common import parse_options, task_of, with_presets
from fusionpl.cli.completion import PARSERS
from fusionpl.cli.sweep import grid
from fusionpl.errors import FusionError
from fusionpl.fusion import Estimate
from fusionpl.presets import CONF
from tests.integration.runs import make_run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- needs: (\w+) -->\n)?^ *```(?:bash|sh|shell|console)\n(.*?)^ *```", re.MULTILINE | re.DOTALL
)


class Shown(NamedTuple):
    """A command line of a page, and what its block is marked to need."""

    page: str
    words: tuple[str, ...]
    needs: str

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def shown() -> Iterator[Shown]:
    for page in PAGES:
        name, text = str(page.relative_to(ROOT)), page.read_text()
        for needs, block in BLOCK.findall(text):
            for line in block.splitlines():
                if words := shlex.split(line, comments=True):
                    yield Shown(name, tuple(words), needs)


def command(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """The command of fusionpl that a line calls, and its arguments; None for other programs."""
    match words:
        case ("fusionpl", name, *rest):
            return name, rest
        case ("python", "-m", module, *rest) if module.startswith("fusionpl.cli."):
            return module.removeprefix("fusionpl.cli."), rest
        case ("python", script, *rest) if script.endswith(".py"):
            return Path(script).stem, rest
    return None


@functools.cache
def parser(name: str, *task: Any) -> ArgumentParser:
    build: Any = PARSERS[name]
    return build(*task)


def check(name: str, words: Sequence[str]) -> None:
    """Raises where a command would refuse its options before it opens a model."""
    if name in ("push", "family"):
        parse_options(parser(name), words)
        return
    words = with_presets(words, "fuse" if name in ("sweep", "check") else name)
    chosen = parser(name, task_of(words))
    options = parse_options(chosen, [word for word in words if word != "--print_config"])
    chosen.instantiate(options)
    compared(options.get("compare") or [])
    for cell in grid(options.sweep) if name == "sweep" else ():
        load_config(None, cell)


COMMANDS = list(dict.fromkeys(shown()))
OURS = [(one, *found) for one in COMMANDS if (found := command(one.words))]
# Fusions of images; what fuses text or models of the hub has its options checked alone.
FUSING = {
    shlex.join(words): words for one, name, words in OURS if name == "fuse" and not one.needs and "bert" not in str(one)
}


def test_every_option_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for one, name, words in OURS:
        try:
            check(name, words)
        except FusionError as error:
            pytest.fail(f"{one}: {error}")
    with pytest.raises(FusionError, match=r"did you mean 'align\.solver'"):
        check("fuse", ["--parents", "A", "B", "--align.solvr", "emd"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that commands name: parents, a family, presets."""
    folder = tmp_path_factory.mktemp("shown")
    runs = [make_run(folder / f"run-{seed}", seed, depth=4) for seed in range(3)]
    for words in FUSING.values():
        parents = takewhile(lambda word: not word.startswith("-"), words[words.index("--parents") + 1 :])
        for path, run in zip(map(folder.joinpath, parents), runs, strict=False):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.symlink_to(run)
    (folder / "conf").symlink_to(CONF)
    shutil.copy(ROOT / "fusionpl/families/library/vit_timm.yaml", folder / "my.yaml")
    return folder


@pytest.mark.parametrize("words", FUSING.values(), ids=FUSING)
def test_every_fusion_is_planned(words: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(Estimate, "told", lambda *_: "")  # which times the machine
    fuse.run([*(word.replace("data/all-sites", "digits") for word in words), "--dry-run"])


def test_what_else_is_shown_is_a_target_of_make_or_marked() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    others = [one for one in COMMANDS if not command(one.words)]
    assert [str(one) for one in others if one.words[0] == "make" and one.words[1] not in targets] == []
    assert [str(one) for one in others if one.words[0] != "make" and not one.needs] == []
    assert {one.needs for one in COMMANDS} <= {"", "gpu", "network"}
