"""`python finetune.py --model runs/vit-digits/fused`: finetunes a model and, beside it, what it is compared with."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, restricted_number_type

from fusionpl.cli.again import own_again, own_of_heads
from fusionpl.cli.options import add_logger_option, add_reading_options, add_trainer_options
from fusionpl.cli.outputs import check_resumable, in_sweep, resumed, run_folder
from fusionpl.cli.own_data import Own
from fusionpl.cli.parsing import changed_settings, new_parser, parse, said, settings_of, with_presets
from fusionpl.cli.push import add_push_options, check_push_options
from fusionpl.cli.running import is_main_process, quiet
from fusionpl.cli.tasks import check_trains, parser_like, task_of
from fusionpl.errors import FusionError
from fusionpl.models.folders import check_there, heads_in
from fusionpl.models.hub import short_name
from fusionpl.options import settings_in
from fusionpl.presets import CONF
from fusionpl.training.config import OptimConfig
from fusionpl.training.tasks import TASKS, TaskName, task_named

PRESET = CONF / "finetune" / "default.yaml"
LAST = "checkpoints/last.ckpt"
Shrink = restricted_number_type("Shrink", float, [(">", 0), ("<=", 1)])


@dataclass(frozen=True)
class Asked:
    """What a command line asks for, checked as far as that needs no model.

    Attributes:
        argv: the command line.
        options: those of data and optimiser as their classes.
        settings: those that decide the result, as plain values.
        changed: those of them that are not as in the preset.
        origin: those of the run that made the model; empty where none did.
        folder: of this run.
        heads: name -> folder of models that share a trunk; empty of one model.
    """

    argv: Sequence[str]
    options: Namespace
    settings: dict[str, Any]
    changed: dict[str, Any]
    origin: dict[str, Any]
    folder: Path
    heads: dict[str, Path]

    @classmethod
    def of(cls, argv: Sequence[str]) -> "Asked":
        """Reads a command line.

        Raises:
            FusionError: a user's mistake.
        """
        words = with_presets(argv, "finetune")
        model = _model_in(words)
        source, origin = Path(model), settings_in(model)
        parser = parser_like(words, origin, [model], build_parser)
        options = parse(parser, words, PRESET)
        check_trains(options.task)
        heads = heads_in(source)
        options.own_data = own_of_heads(words, origin, options, heads) if heads else own_again(words, origin, options)
        chosen, settings = parser.instantiate(options), settings_of(parser, options)
        if not heads:
            check_there([model])
        home = source.parent if source.is_dir() else Path("runs")
        folder = Path(options.output or in_sweep(home / f"{short_name(model)}-finetuned"))
        check_push_options(options.push_to, options.push_private)
        changed = changed_settings(settings, words, parser, PRESET)
        return cls(argv, chosen, settings, changed, origin, folder, heads)

    @property
    def elsewhere(self) -> bool:
        """Whether the task is another than that of the run that made the model."""
        origin = self.origin
        return bool(origin) and self.options.task != task_named(origin.get("task", "image-classification"))


def build_parser(task: TaskName = "image-classification") -> ArgumentParser:
    """The options of finetune.py for a task."""
    parser = new_parser(f"Finetunes a model. Without --config the preset {PRESET.name} is used.")
    parser.add_argument("--task", type=task_named, default=task, help="what is learned; decides the options of data")
    parser.add_argument("--model", type=str | None, help="a fused model, or any run folder, model folder or "
                        "hub id (org/name or org/name@revision)")  # fmt: skip
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="decides data order and augmentation")
    parser.add_argument("--baselines", type=bool, default=True, help="finetune best parent and vanilla average too")
    parser.add_argument("--shrink", type=Shrink, default=1.0, help="multiply weights by this first, those "
                        "that weight decay acts on; 0.7 for parents that have converged")  # fmt: skip
    parser.add_argument("--output", type=str | None, help="where the finetuned model goes")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    parser.add_argument("--resume", action="store_true", help="continue a finetuning that was stopped")
    parser.add_argument("--own-data", type=Own | dict[str, Any] | None, help="""options of data of each parent of
                        a fused model; by default those that it was fused with, unless --data.path or --data.classes
                        name a set of all""")  # fmt: skip
    add_logger_option(parser)
    add_push_options(parser)
    add_reading_options(parser)
    parser.add_class_arguments(TASKS[task].data, "data")
    parser.add_class_arguments(OptimConfig, "optim")
    add_trainer_options(parser)
    return parser


def run(argv: Sequence[str]) -> None:
    """Finetunes, from `argv` to the exported models and the longer report.

    Raises:
        FusionError: a user's mistake.
        KeyboardInterrupt: the user stopped it; the message says how to continue.
    """
    quiet()
    asked = Asked.of(argv)
    options, folder, started = asked.options, asked.folder, time.monotonic()
    try:
        with resumed(folder) if options.resume else run_folder(folder, options.overwrite, keep=LAST):
            if options.resume:
                check_resumable(folder, options.trainer.strategy)
            from fusionpl.cli.jobs.finetune import finetune

            origins, rows = finetune(asked)
    except KeyboardInterrupt as stop:
        words = [word for word in with_presets(argv, "finetune") if word not in ("--resume", "--overwrite")]
        raise KeyboardInterrupt(f"continue with: python finetune.py {shlex.join([*words, '--resume'])}") from stop
    if is_main_process():
        from fusionpl.cli.jobs.finetuned import finish

        finish(asked, origins, rows, started)


def _model_in(argv: Sequence[str]) -> str:
    """The value of --model, which decides what the other options are."""
    model = said(argv, "--model")
    if model is None:
        if "-h" in argv or "--help" in argv:
            parse(build_parser(task_of(argv)), argv, PRESET)
        raise FusionError("which model? give --model, for example --model runs/vit-digits/fused")
    return str(model)
