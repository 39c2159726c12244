"""Every fusion that README.md and docs/ show can be planned on parents.

`make demo` runs the path of README.md and docs/index.md for real, `test_notebook.py` the notebook.
"""

import shlex
import shutil
from itertools import takewhile
from pathlib import Path

import pytest

from fusionpl.cli import fuse
from fusionpl.presets import CONF
from tests.integration.runs import make_run
from tests.unit.test_documented_commands import ROOT, commands, subcommand

# Of images; what fuses text or models of the hub has its options checked alone.
FUSIONS = [
    subcommand(shlex.split(line, comments=True))[1:]
    for _, line, needs in commands()
    if not needs and "bert" not in line and line.startswith(("python fuse.py", "fusionpl fuse"))
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that commands name: parents, a family, presets."""
    folder = tmp_path_factory.mktemp("shown")
    runs = [make_run(folder / f"run-{seed}", seed, depth=4, img_size=24) for seed in range(3)]
    for words in FUSIONS:
        parents = takewhile(lambda word: not word.startswith("-"), words[words.index("--parents") + 1 :])
        for path, run in zip(map(folder.joinpath, parents), runs, strict=False):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.symlink_to(run)
    (folder / "conf").symlink_to(CONF)
    shutil.copy(ROOT / "fusionpl/families/library/vit_timm.yaml", folder / "my.yaml")
    return folder


@pytest.mark.parametrize("words", FUSIONS, ids=map(shlex.join, FUSIONS))
def test_a_fusion_is_planned(words: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    words = ["digits" if word.startswith("data/") else word for word in words]
    fuse.run([*words, "--data.image_size", "24", "--dry-run"])  # room for the window of the paper
