"""Finetunes models that share a trunk, all heads at once."""

import json
from collections.abc import Mapping
from functools import partial

import lightning as L
from torch import nn

from fusionpl.cli.finetune import Asked
from fusionpl.cli.jobs.candidates import device_of_run
from fusionpl.cli.jobs.cards import MadeOf, metadata
from fusionpl.cli.jobs.data import data_module, follow
from fusionpl.cli.jobs.finetuned import DONE, SAMPLES, Tested, loggers_of
from fusionpl.cli.running import is_main_process, quiet
from fusionpl.datamodules.heads import HeadSplits
from fusionpl.errors import FusionError
from fusionpl.evaluation.cost import flops, parameters
from fusionpl.evaluation.metrics import evaluate_samples
from fusionpl.evaluation.rows import Row, readable
from fusionpl.evaluation.scores import Scores, in_row
from fusionpl.families.family import read_family
from fusionpl.files import write_json
from fusionpl.models.lineage import inherited
from fusionpl.models.save import save_model
from fusionpl.models.separate import load_models
from fusionpl.models.tokenizers import load_tokenizer
from fusionpl.options import write_settings
from fusionpl.paths import public
from fusionpl.training.dashboard import log_models
from fusionpl.training.fit import FitResult, fit
from fusionpl.training.heads import HeadsModule
from fusionpl.training.loggers import finish_loggers
from fusionpl.training.module import shrunk
from fusionpl.training.tasks import TASKS

NAME = "fused"  # of the row
FIGURES_OF = "heads.json"  # head -> what was measured of it


def finetune_heads(asked: Asked) -> tuple[dict[str, MadeOf], list[Tested]]:
    """Trains the trunk and all heads, each on its own data; nothing is finetuned beside them.

    Returns:
        See `finetune`.

    Raises:
        FusionError: a user's mistake.
    """
    quiet()
    options = asked.options
    if options.trainer.strategy == "fsdp":
        raise FusionError("models that share a trunk can't be shared out by fsdp; use --trainer.strategy ddp")
    done = asked.folder / DONE
    if is_main_process():
        write_settings(asked.folder, asked.settings)
    if not (options.resume and done.is_file()):
        _finetune(asked)
    if not is_main_process():
        return {}, []
    figures, origins = json.loads((asked.folder / FIGURES_OF).read_text()), {}
    for name, given in options.own_data.items():
        section, data = inherited(asked.heads[name])
        settings = {**asked.settings, "task": given["task"], "data": given, "own_data": None}
        measured = metadata(settings, figures[name], f"{asked.folder.name}-{name}")
        origins[asked.heads[name].name] = section, data | {"tags": ["fusionpl", "merge"]} | measured
    return origins, [Tested.read(done, asked.folder / SAMPLES)]


def _finetune(asked: Asked) -> None:
    options = asked.options
    L.seed_everything(options.seed, workers=True, verbose=False)
    family, allowed = read_family(asked.origin.get("family")), options.allow_pickle
    loaded = load_models(options.model, allow_pickle=allowed, family=family)
    models = {name: loaded[name] for name in options.own_data}
    data = _data(asked, models)
    network = shrunk(nn.ModuleList(models.values()), options.shrink)
    if is_main_process():
        print(f"finetuning {len(models)} heads and their trunk for {options.trainer.max_epochs} epochs: "
              f"{data.describe()}; the parents are finetuned by themselves, each with its own --model")  # fmt: skip
    resume = options.resume and (asked.folder / "checkpoints" / "last.ckpt").is_file()
    loggers = loggers_of(asked, NAME, asked.folder, resume=resume)
    result = fit(
        network, data, options.optim, options.trainer.as_dict(), asked.folder, seed=options.seed, loggers=loggers,
        resume=resume, monitor="val/loss", mode="min", module=partial(HeadsModule, data=data),
    )  # fmt: skip
    if is_main_process():
        _write(asked, result, data)
        log_models(loggers, used=[options.model])
    finish_loggers(loggers)


def _data(asked: Asked, models: Mapping[str, nn.Module]) -> HeadSplits:
    """The data of each head, with the numbers, and for the images and tokens, of its model."""
    own = {}
    for name, model in models.items():
        given, folder = dict(asked.options.own_data[name]), str(asked.heads[name])
        task = given.pop("task")
        config = TASKS[task].data(**given)
        data = data_module(task, config, asked.options.seed, load_tokenizer(folder), [folder])
        follow(data, model, folder)
        own[name] = data
    return HeadSplits(own)


def _write(asked: Asked, result: FitResult, data: HeadSplits) -> None:
    """Writes a folder for each head, whose trunks are one, and what was measured; metrics.json last."""
    data.alone()
    models = dict(zip(data.own, result.model.children(), strict=True))
    figures: dict[str, dict[str, float]] = {}
    tasks: dict[str, Scores] = {}
    for name, model in models.items():
        found, outcomes = evaluate_samples([model.to(device_of_run(asked))], data.own[name].test_dataloader())
        figures[name] = found
        if "accuracy" in found:
            tasks[name] = Scores.share(outcomes)
    result.model.cpu()
    for name, model in models.items():
        shown = ", ".join(f"{key} {readable(key, value)}" for key, value in figures[name].items())
        print(f"{name}: {shown}")
        card = (
            f"# {name}, finetuned from {public(asked.options.model)} with {len(models) - 1} more on the same trunk\n\n"
            f"on the test split: {shown}"
        )
        place, own = asked.folder / asked.heads[name].name, data.own[name]
        save_model(model, place, card=card, tokenizer=own.tokenizer, processing=own.processing)
    write_json(asked.folder / FIGURES_OF, figures)
    row = _row(result, models, data, tasks)
    Tested(row, None, tasks).write(asked.folder / DONE, asked.folder / SAMPLES)


def _row(result: FitResult, models: Mapping[str, nn.Module], data: HeadSplits, tasks: Mapping[str, Scores]) -> Row:
    """The row of all heads: the accuracy of each that has one, the mean where all have, and that of their losses."""
    mean = sum(scores.figure for scores in tasks.values()) / len(models) if len(tasks) == len(models) else None
    first = next(iter(models))
    cost = flops(models[first], next(iter(data.own[first].test_dataloader())))
    return Row(
        NAME, "finetuned", accuracy=mean, loss=result.figures.get("loss"), **in_row(tasks),
        parameters=parameters(result.model), flops=cost, epochs=result.epochs, seconds=round(result.seconds, 1),
    )  # fmt: skip
