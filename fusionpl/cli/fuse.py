"""`python fuse.py --parents A B`: align, average, evaluate, report."""

import argparse
import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from torch import nn
from tqdm import tqdm

from fusionpl.calibration import logits
from fusionpl.cli.common import (
    CONF,
    add_trainer_options,
    check_output,
    new_parser,
    parse,
    quiet,
    settings_in,
    settings_of,
    staged,
    task_of,
)
from fusionpl.datamodules import FixedSplits
from fusionpl.errors import FusionError
from fusionpl.evaluation import Curve, Report, Row, evaluate, evaluate_ensemble, flops, interpolation, parameters
from fusionpl.families import permutation_error
from fusionpl.fusion import (
    FuseConfig,
    FusionResult,
    RefineConfig,
    check_parents,
    fuse,
    load_config,
    mixing_weights,
    plan,
    resolve_anchor,
    vanilla,
)
from fusionpl.models import check_tokenizers, load_model, load_tokenizer
from fusionpl.training import (
    TASKS,
    ClassificationModule,
    LoggerName,
    OptimConfig,
    OTFusion,
    TaskName,
    finish_loggers,
    log_report,
    make_loggers,
    refine,
)

PRESET = CONF / "fuse" / "default.yaml"
CURVE_BATCHES = 4
PROOF_TOLERANCE = 1e-3


def run(argv: Sequence[str]) -> None:
    """The command; see `--help`."""
    quiet()
    started = time.monotonic()
    parser, args = arguments(argv)
    settings = {key: value for key, value in settings_of(parser, args).items() if key not in ("check", "dry_run")}
    chosen = parser.instantiate(args)
    config = fuse_config(chosen)
    beside = {path: load_config(path) for path in args.compare}
    parents = load_parents(args.parents)
    names, models = list(parents), list(parents.values())
    bindings = check_parents(models, names)
    anchor = resolve_anchor(config, len(models))
    tokenizer = common_tokenizer(dict(zip(names, args.parents, strict=True)))
    data = TASKS[args.task].datamodule(chosen.data, 0, tokenizer)
    data.check_model(models[anchor])
    if args.dry_run:
        print(plan(bindings, anchor, config, names))
        return
    if args.check:
        _check(parents, data)
        return
    output = Path(args.output or _default_output(args.parents))
    check_output(output, args.overwrite)
    family = bindings[anchor].family.name
    print(f"parents: {', '.join(names)} ({family}, {bindings[anchor].depth} blocks); anchor: {names[anchor]}")
    fusion = OTFusion(models, replace(config, refine=RefineConfig()), names=names, progress=progress_bar)
    trainer = L.Trainer(
        callbacks=[fusion], **(args.trainer.as_dict() | {"logger": False, "enable_progress_bar": False})
    )
    module = ClassificationModule(copy.deepcopy(models[anchor]), OptimConfig(), data.num_classes, data.metrics)
    trainer.test(module, datamodule=data, verbose=False)
    assert fusion.result is not None
    result = fusion.result
    if config.refine.method != "none":
        result.config = config
        refine(result, data.calibration_dataloader(), trainer_args=args.trainer.as_dict())
    others = {
        f"fused ({Path(path).stem})": fuse(models, data.calibration_dataloader(), other, names=names).model
        for path, other in beside.items()
    }
    if not trainer.is_global_zero:
        return
    report = _report(parents, anchor, result, others, data, trainer.strategy.root_device, settings)
    with staged(output, args.overwrite) as folder:
        result.save(folder, tokenizer=tokenizer, card=_card(report, names))
        (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        report.save(folder / "report")
    for line in result.warnings:
        print(f"warning: {line}")
    print(f"\n{report.table()}\n")
    loggers = make_loggers(args.logger, output, name=f"fuse {output.name}", config=settings)
    log_report(loggers, report, output, parents=args.parents)
    finish_loggers(loggers)
    print(f"{output}: model/, report/report.md, maps.safetensors; {time.monotonic() - started:.0f} s")
    print(f"next: python finetune.py --model {output}")


def build_parser(task: TaskName = "image-classification") -> ArgumentParser:
    """The options of fuse.py for parents of a task."""
    parser = new_parser(f"Aligns parents and averages them. Without --config the preset {PRESET.name} is used.")
    parser.add_argument("--parents", nargs="+", type=str, default=[], help="run folders, model folders or hub ids")
    parser.add_argument("--task", type=TaskName, default=task, help="what the parents were trained for")
    parser.add_argument("--output", type=str | None, help="where the fused model goes")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    parser.add_argument("--logger", type=LoggerName, default="wandb", help="metrics.csv is always written")
    parser.add_argument("--compare", nargs="+", type=str, default=[], help="more fuse presets, for rows in the report")
    parser.add_argument("--check", action="store_true", help="prove the family on the parents; fuse nothing")
    parser.add_argument("--dry-run", action="store_true", help="print axes, sizes, maps and joins; fuse nothing")
    parser.add_class_arguments(FuseConfig)
    parser.add_class_arguments(TASKS[task].data, "data")
    add_trainer_options(parser)
    return parser


def arguments(
    argv: Sequence[str], more: Callable[[ArgumentParser], None] = lambda _: None
) -> tuple[ArgumentParser, Namespace]:
    """The parser and what it read: task and data set are the parents' own unless the command line names others.

    Args:
        argv: the arguments.
        more: adds further options to the parser.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--parents", nargs="+", default=[])
    known, _ = peek.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    origin = next((found for found in map(settings_in, known.parents) if found), {})
    task = task_of(argv, origin.get("task", "image-classification"))
    parser = build_parser(task)
    more(parser)
    if task == origin.get("task", task):
        parser.set_defaults({f"data.{key}": value for key, value in origin.get("data", {}).items()})
    args = parse(parser, argv, PRESET)
    if len(args.parents) < 2:
        raise FusionError(f"fusion needs at least two parents, not {len(args.parents)}; give --parents RUN_A RUN_B")
    return parser, args


def fuse_config(options: Namespace) -> FuseConfig:
    """The FuseConfig among instantiated options."""
    return FuseConfig(**{field.name: options[field.name] for field in fields(FuseConfig)})


def load_parents(paths: Sequence[str]) -> dict[str, nn.Module]:
    """Loads the parents and gives each the shortest name that tells it from the others."""
    names = [Path(path).name for path in paths]
    if len(set(names)) < len(names):
        names = [f"{name}#{index + 1}" for index, name in enumerate(names)]
    return {name: load_model(path) for name, path in zip(names, paths, strict=True)}


def common_tokenizer(parents: Mapping[str, str]) -> Any:
    """The tokenizer of parents (name -> path), or None; raises FusionError where they differ."""
    found = {name: load_tokenizer(path) for name, path in parents.items()}
    check_tokenizers(found)
    return next(iter(found.values()))


def _default_output(parents: Sequence[str]) -> Path:
    folders = {Path(path).resolve().parent for path in parents if Path(path).is_dir()}
    return (Path(parents[0]).parent if len(folders) == 1 else Path("runs")) / "fused"


def progress_bar(steps: Iterable[Any], label: str) -> Iterable[Any]:
    """A bar on a terminal, nothing elsewhere."""
    bar: Iterable[Any] = tqdm(steps, desc=label, leave=False, dynamic_ncols=True, disable=None)
    return bar


def _check(parents: Mapping[str, nn.Module], data: FixedSplits) -> None:
    batch = next(iter(data.calibration_dataloader(16)))
    for name, model in parents.items():
        with torch.inference_mode():
            size = float(logits(model, batch).abs().max())
        error = permutation_error(model, lambda one: logits(one, batch))
        if not error <= PROOF_TOLERANCE * size:
            raise FusionError(
                f"{name}: renumbering its units changes outputs by {error:.1e} (outputs are up to {size:.1f}); "
                "its family file does not describe this model"
            )
        print(f"{name}: ok; renumbering all units at random changes outputs by {error:.1e} (outputs up to {size:.1f})")


def _report(
    parents: Mapping[str, nn.Module],
    anchor: int,
    result: FusionResult,
    others: Mapping[str, nn.Module],
    data: FixedSplits,
    device: torch.device,
    settings: dict[str, Any],
) -> Report:
    # before the parents move: averages are in float64, which `device` may lack
    plain = vanilla(list(parents.values()), mixing_weights(result.config.weights, len(parents)))
    models = [parent.to(device) for parent in parents.values()]
    batches = list(data.test_dataloader())
    sample = batches[0]
    candidates = {f"parent {name}": model for name, model in zip(parents, models, strict=True)}
    rows = [_row(name, evaluate(model, batches), [model], sample) for name, model in candidates.items()]
    rows.append(_row("ensemble", evaluate_ensemble(models, batches), models, sample))
    fused = {
        "vanilla": plain,
        **others,
        "aligned average": result.averaged,
        "refitted": result.refitted,
        "fused": result.model,
    }
    for name, model in fused.items():
        if model is not None:
            rows.append(_row(name, evaluate(model.to(device), batches), [model], sample))
    other = next(index for index in range(len(models)) if index != anchor)
    ends = {"aligned": (result.aligned_parent(other), result.aligned_parent(anchor))}
    if plain is not None:
        ends = {"vanilla": (models[other], models[anchor])} | ends
    few = list(islice(data.val_dataloader(), CURVE_BATCHES))
    if rows[0].accuracy is None:  # the curve of a regression has no accuracy to show
        ends = {}
    barrier: dict[str, Curve] = {
        name: interpolation(models[anchor], end.state_dict(), start.state_dict(), few)
        for name, (end, start) in progress_bar(list(ends.items()), "loss barrier")
    }
    return Report(rows, settings, barrier, dict(_shown_maps(result)))


def _row(name: str, metrics: dict[str, Any], models: Sequence[nn.Module], sample: Any) -> Row:
    return Row(
        name=name,
        parameters=sum(parameters(model) for model in models),
        flops=sum(flops(model, sample) for model in models),
        **metrics,
    )


def _shown_maps(result: FusionResult) -> Iterator[tuple[str, torch.Tensor]]:
    """A few maps that tell the story: the embedding, one block in the middle, the last of the stream."""
    names = [name for name in result.maps if name.startswith("stem.")]
    sections = list(dict.fromkeys(name.rpartition(".")[0] for name in result.maps if not name.startswith("stem.")))
    middle = sections[(len(sections) - 1) // 2]
    names = [*names[-1:], *(f"{middle}.{axis}" for axis in ("q", "v", "attn", "ffn")), f"{sections[-1]}.out"]
    for name in names:
        if name in result.maps:
            yield name, result.maps[name].plan


def _card(report: Report, names: Sequence[str]) -> str:
    return (
        f"# Fused from {', '.join(names)}\n\n"
        "Aligned with optimal transport and averaged by fusionpl "
        "([Transformer Fusion with Optimal Transport](https://arxiv.org/abs/2310.05719)).\n\n"
        + report.markdown().partition("\n")[2].lstrip()
    )
