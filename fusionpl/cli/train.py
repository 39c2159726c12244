"""`python train.py --seed 1`: trains one parent."""

import functools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt

from fusionpl.cli.cards import metadata
from fusionpl.cli.common import (
    add_logger_option,
    add_trainer_options,
    check_trains,
    new_parser,
    parse,
    quiet,
    settings_of,
    task_of,
    with_presets,
)
from fusionpl.cli.outputs import is_main_process, resumed, run_folder, write_json
from fusionpl.datamodules.base import FixedSplits
from fusionpl.errors import FusionError, flattened
from fusionpl.evaluation import readable
from fusionpl.models.build import ModelConfig, build_model
from fusionpl.models.save import save_model
from fusionpl.paths import public_settings
from fusionpl.presets import CONF
from fusionpl.training.dashboard import log_models
from fusionpl.training.fit import FitResult, fit
from fusionpl.training.loggers import finish_loggers, make_loggers
from fusionpl.training.module import ClassificationModule, OptimConfig
from fusionpl.training.tasks import TASKS, TaskName, task_named
from fusionpl.training.weights_and_biases import in_sweep

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
    folder = Path(options.output or in_sweep(Path(f"runs/{options.name}/seed-{options.seed}")))
    try:
        if options.resume:
            with resumed(folder):
                _check_same(folder, settings_of(parser, options))
                _train(parser, options, folder)
        else:
            with run_folder(folder, options.overwrite, keep=LAST):
                _train(parser, options, folder)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(_how_to_go_on(folder, argv)) from stop


def _train(parser: ArgumentParser, options: Namespace, folder: Path) -> None:
    chosen = parser.instantiate(options)
    settings = settings_of(parser, options)
    L.seed_everything(options.seed, workers=True, verbose=False)
    task = TASKS[options.task]
    data = task.datamodule(chosen.data, options.seed, None)
    model = build_model(
        chosen.model, num_classes=data.num_classes, class_names=data.class_names, args=data.model_args()
    )
    name = f"{options.name}/seed-{options.seed}"
    loggers = make_loggers(options.logger, folder, name=name, job="train", config=settings, resume=options.resume)
    if is_main_process():
        (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(
            f"training {chosen.model.architecture} ({size:.2f} M parameters) on {data.describe()} of"
            f" {chosen.data.path}, seed {options.seed}, into {folder}"
        )
    result = fit(
        model,
        data,
        chosen.optim,
        options.trainer.as_dict(),
        folder,
        seed=options.seed,
        loggers=loggers,
        resume=options.resume,
        monitor=task.monitor,
        mode=task.mode,
        module=functools.partial(ClassificationModule, compiled=options.compile),
    )
    if is_main_process():
        _export(result, data, settings, folder)
        log_models(loggers, made=folder)
    finish_loggers(loggers)


def _export(result: FitResult, data: FixedSplits, settings: dict[str, Any], folder: Path) -> None:
    """Writes metrics.json and model/, and prints the result."""
    tested = {**result.figures, **data.derived(result.figures), **data.baseline()}
    figures = {
        **tested,
        "best_epoch": result.best_epoch,
        "epochs": result.epochs,
        "seconds": round(result.seconds, 1),
    }
    write_json(folder / "metrics.json", figures)
    save_model(
        result.model,
        folder / "model",
        tokenizer=data.tokenizer,
        processing=data.processing,
        card=_card(result, tested, public_settings(settings)),
        metadata=metadata(settings, tested, f"{settings['name']}-seed-{settings['seed']}"),
    )
    print(
        f"test {', '.join(f'{name} {readable(name, value)}' for name, value in tested.items())}"
        f" (epoch {result.best_epoch} of {result.epochs}, the best in validation); {result.seconds:.0f} s of training"
    )
    print(f"model: {folder / 'model'}")


def _card(result: FitResult, tested: dict[str, float], settings: dict[str, Any]) -> str:
    figures = "\n".join(f"| {name} | {value:.4f} |" for name, value in tested.items())
    return f"""# {settings["name"]}, seed {settings["seed"]}

{settings["model"]["architecture"]} trained from random weights on `{settings["data"]["path"]}`. The weights are those
of epoch {result.best_epoch} of {result.epochs}, the best in validation.

| on the test split | |
|---|---|
{figures}

The run's settings:

```yaml
{yaml.safe_dump(settings, sort_keys=False).strip()}
```"""


def _check_same(folder: Path, settings: dict[str, Any]) -> None:
    """Refuses to resume a run with other settings than it was started with."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise FusionError(f"there is no run to resume in {folder} (no config.yaml); start one without --resume")
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
