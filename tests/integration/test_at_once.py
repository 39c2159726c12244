"""A command reads its options, and answers mistakes in them, before anything is loaded that takes seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusionpl.cli.main import COMMANDS

HEAVY = (
    "datasets", "lightning", "matplotlib", "numpy", "ot", "pandas", "peft", "scipy", "sklearn", "timm", "torch",
    "torchmetrics", "torchvision", "transformers", "wandb",
)  # fmt: skip
NOWHERE = ["--parents", "nowhere/near/a", "nowhere/near/b"]
SWEPT = ["--sweep", "align.residual=tie,average"]
WRONG = {
    "no command": (["fusee"], "there is no command 'fusee'; did you mean 'fuse'?"),
    "train: unknown option": (["train", "--optim.lrr", "1"], "did you mean 'optim.lr'?"),
    "train: no such word": (["train", "--trainer.precision", "17"], "trainer.precision: 17 is not 64 or 32 or 16"),
    "train: out of range": (["train", "--data.image_size", "0"], "data.image_size must be at least 1, not 0"),
    "train: no normalisation": (["train", "--data.normalize", "imagnet"], "did you mean 'imagenet'?"),
    "train: short blocks": (
        ["train", "--config", "bert-pydoc", "--data.block_size", "2"],
        "data.block_size is 2; a block is",
    ),
    "train: no preset": (["train", "--config", "vit-digit"], "did you mean 'vit-digits'?"),
    "train: taken": (["train", "--output", "taken"], "taken exists; replace it with --overwrite"),
    "train: nothing to resume": (["train", "--resume", "--output", "taken"], "there is no run to resume in taken"),
    "fuse: unknown option": (["fuse", "--parents", "taken", "taken", "--widht", "2"], "did you mean 'width'?"),
    "fuse: out of range": (["fuse", *NOWHERE, "--width", "-1"], "width must be above 0, not -1"),
    "fuse: weights": (["fuse", *NOWHERE, "--weights", "[0.9, 0.9]"], "weights must sum to 1"),
    "fuse: no parent": (["fuse", *NOWHERE], "no model at nowhere/near/a"),
    "fuse: no such comparison": (["fuse", *NOWHERE, "--compare", "distiled"], "did you mean 'distilled'?"),
    "fuse: taken": (["fuse", "--parents", "taken", "taken", "--output", "taken"], "taken exists"),
    "check: no parent": (["check", *NOWHERE], "no model at nowhere/near/a"),
    "finetune: no model": (["finetune"], "which model?"),
    "finetune: out of range": (["finetune", "--model", "nowhere/near/a", "--shrink", "2"], "shrink: not of type"),
    "finetune: not there": (["finetune", "--model", "nowhere/near/a"], "no model at nowhere/near/a"),
    "evaluate: wrong type": (["evaluate", "--models", "nowhere/near/a", "--data.batch_size", "x"], "'x' is not int"),
    "evaluate: not there": (["evaluate", "--models", "nowhere/near/a"], "no model at nowhere/near/a"),
    "sweep: out of range": (["sweep", *NOWHERE, "--sweep", "align.reg=-1,1"], "align.reg must be above 0, not -1"),
    "sweep: no parent": (["sweep", *NOWHERE, *SWEPT], "no model at nowhere/near/a"),
    "push: no run": (["push", "nowhere", "--to", "a/b"], "no model with a card at nowhere/model"),
    "family: not there": (["family", "nowhere/near/a"], "no model at nowhere/near/a"),
}
RIGHT = {
    "import": "import fusionpl",
    "options": "import fusionpl; fusionpl.load_config('paper', {'align.solver': 'emd'})",
    "completion": "from fusionpl.cli.main import run; run(['completion', 'bash'])",
    "presets": "from fusionpl.cli.main import run\ntry: run(['fuse', '--list-presets'])\nexcept SystemExit: pass",
    **{
        f"{name} --help": f"from fusionpl.cli.main import run\ntry: run(['{name}', '--help'])\nexcept SystemExit: pass"
        for name in COMMANDS
    },
}
LOADED = f"\nimport json, sys; print('\\n' + json.dumps([name for name in {HEAVY} if name in sys.modules]))"


def python(code: str, folder: Path) -> tuple[list[str], str]:
    """What the code has loaded of HEAVY, and what it said of mistakes."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code + LOADED], capture_output=True, text=True, check=True, cwd=folder, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize("name", RIGHT)
def test_nothing_is_loaded_that_takes_seconds(name: str, tmp_path: Path) -> None:
    assert python(RIGHT[name], tmp_path) == ([], "")


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_answered_at_once(name: str, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    argv, words = WRONG[name]
    code = f"from fusionpl.cli import main, running; assert running.main(main.run, {argv}) == 2"
    loaded, said = python(code, tmp_path)
    assert words in said
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert not loaded
