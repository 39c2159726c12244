"""`python train.py --seed 1`: trains one parent."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt

from fusionpl.cli.options import add_logger_option, add_trainer_options
from fusionpl.cli.outputs import in_sweep, resumed, run_folder
from fusionpl.cli.parsing import new_parser, parse, settings_of, with_presets
from fusionpl.cli.running import quiet
from fusionpl.cli.tasks import check_trains, task_of
from fusionpl.errors import FusionError, flattened
from fusionpl.models.config import ModelConfig
from fusionpl.options import SETTINGS
from fusionpl.presets import CONF
from fusionpl.training.config import OptimConfig
from fusionpl.training.tasks import TASKS, TaskName, task_named

PRESET = CONF / "train" / "vit-digits.yaml"
LAST = "checkpoints/last.ckpt"
# A resumed run may change where it runs, never what it computes.
MAY_CHANGE = (
    "logger",
    "data.num_workers",
    "data.on_device",
    "compile",
    "trainer.accelerator",
    "trainer.enable_progress_bar",
)


def build_parser(task: TaskName = "image-classification") -> ArgumentParser:
    """The options of train.py for a task."""
    parser = new_parser(f"Trains a parent. Without --config the preset {PRESET.name} is used.")
    parser.add_argument("--task", type=task_named, default=task, help="what is learned; decides the options of data")
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="decides initialisation and data order")
    parser.add_argument("--name", type=str, default="run", help="the run is kept in runs/NAME/seed-SEED")
    parser.add_argument("--output", type=str | None, help="another folder for the run")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is there")
    parser.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    add_logger_option(parser)
    parser.add_argument("--compile", type=bool, default=False, help="run the model through torch.compile")
    parser.add_class_arguments(ModelConfig, "model")
    parser.add_class_arguments(TASKS[task].data, "data")
    parser.add_class_arguments(OptimConfig, "optim")
    add_trainer_options(parser)
    return parser


def run(argv: Sequence[str]) -> None:
    """Trains a parent, from `argv` to the exported model.

    Raises:
        FusionError: a user's mistake.
        KeyboardInterrupt: the user stopped it; the message says how to continue.
    """
    quiet()
    argv = with_presets(argv, "train")
    parser = build_parser(task_of(argv))
    options = parse(parser, argv, PRESET)
    check_trains(options.task)
    chosen, settings = parser.instantiate(options), settings_of(parser, options)
    folder = Path(options.output or in_sweep(Path(f"runs/{options.name}/seed-{options.seed}")))
    try:
        with resumed(folder) if options.resume else run_folder(folder, options.overwrite, keep=LAST):
            if options.resume:
                _check_same(folder, settings)
            from fusionpl.cli.jobs.train import train

            train(chosen, settings, folder)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(_how_to_go_on(folder, argv)) from stop


def _check_same(folder: Path, settings: dict[str, Any]) -> None:
    """Refuses to resume a run with other settings than it was started with."""
    file = folder / SETTINGS
    if not file.is_file():
        raise FusionError(f"there is no run to resume in {folder} (no {SETTINGS}); start one without --resume")
    before, now = flattened(yaml.safe_load(file.read_text())), flattened(settings)
    for key in sorted(before.keys() | now.keys()):
        if key not in MAY_CHANGE and before.get(key) != now.get(key):
            raise FusionError(
                f"{folder} was started with {key} {before.get(key)}, not {now.get(key)}; give --resume the options"
                f" of the start, or its --config {file}"
            )


def _how_to_go_on(folder: Path, argv: Sequence[str]) -> str:
    if not (folder / LAST).is_file():
        return "no epoch was finished, so nothing is kept"
    words = [word for word in argv if word not in ("--resume", "--overwrite")]
    return f"continue with: python train.py {shlex.join([*words, '--resume'])}"
