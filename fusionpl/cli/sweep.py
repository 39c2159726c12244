"""`python -m fusionpl.cli.sweep --parents A B --sweep align.residual=average,skip`: a grid of fusions, one table.

All cells that look at the same tokens of the same samples share one calibration pass.
"""

import csv
import itertools
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from fusionpl.cli.common import data_module, follow, main, quiet, settings_of
from fusionpl.cli.fuse import arguments, common_tokenizer, fuse_config, fusing_parser, named, progress_bar
from fusionpl.cli.outputs import check_output, staged
from fusionpl.errors import FusionError, flattened
from fusionpl.evaluation import Report, Row, evaluate
from fusionpl.families import read_family
from fusionpl.fusion.average import mixing_weights
from fusionpl.fusion.config import FuseConfig, load_config
from fusionpl.fusion.fuse import Calibrated, resolve_anchor
from fusionpl.models.images import with_image_size
from fusionpl.models.load import load_model
from fusionpl.models.pipelines import check_tokenizers
from fusionpl.models.pixels import with_pixels
from fusionpl.models.tokenizers import load_tokenizer
from fusionpl.training.dashboard import log_models, log_report
from fusionpl.training.loggers import finish_loggers, make_loggers
from fusionpl.training.tasks import TaskName

Cell = dict[str, Any]


def run(argv: Sequence[str]) -> None:
    """The command: every combination of the swept values, evaluated on the test split.

    Raises:
        FusionError: a user's mistake.
    """
    quiet()
    parser, args = arguments(argv, build_parser)
    settings = {key: value for key, value in settings_of(parser, args).items() if key not in ("check", "dry_run")}
    chosen = parser.instantiate(args)
    base, family = asdict(fuse_config(chosen)), read_family(args.family)
    cells = grid(args.sweep)
    if base["strategy"] == "auto" and any(key.startswith("align.") for key in cells[0]):
        base["strategy"] = "transport"
    configs = {label(cell): load_config(None, {**flattened(base), **cell}) for cell in cells}
    groups = passes(configs, len(args.parents))
    for config in configs.values():
        mixing_weights(config.weights, len(args.parents))
    first = Path(args.parents[0])
    output = Path(args.output or (first.parent if first.is_dir() else Path("runs")) / "sweep")
    check_output(output, args.overwrite)
    parents = named(args.parents)
    models = [load_model(path, allow_pickle=args.allow_pickle) for path in parents.values()]
    # Cells may have other anchors, but the data are cut into tokens, and images prepared, once.
    tokenizers = {name: load_tokenizer(path) for name, path in parents.items()}
    data = data_module(args.task, chosen.data, 0, common_tokenizer(tokenizers, 0, renumbered=False), args.parents)
    for line in check_tokenizers(tokenizers, renumbered=False, texts=data.texts()):
        print(f"warning: {line}")
    follow(data, models[0], args.parents[0])
    models = [
        with_pixels(with_image_size(model, models[0], family), path, data.processing, family)
        for model, path in zip(models, args.parents, strict=True)
    ]
    for model in models:
        data.follow(model)
    data.check_model(models[0])
    test = list(data.test_dataloader())
    report = Report(config=settings)
    for name, model in zip(parents, models, strict=True):
        report.add(Row(f"parent {name}", **_scores(evaluate(model, test))))
    for group in groups:
        calibrated = Calibrated(
            models, data.calibration_dataloader(), list(group.values()), names=list(parents), augment=data.augmented,
            seed=args.seed, family=family, progress=progress_bar,
        )  # fmt: skip
        for name, config in progress_bar(group.items(), f"sweep, {len(configs)} cells"):
            started = time.monotonic()
            result = calibrated.fuse(config)
            seconds = round(time.monotonic() - started, 2)
            report.add(Row(name, **_scores(evaluate(result.model, test)), seconds=seconds))
    with staged(output, args.overwrite) as folder:
        (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        report.save(folder / "report")
        columns, rows = report.rows_as_table()
        with (folder / "sweep.csv").open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
    print(report.table())
    loggers = make_loggers(args.logger, output, name=f"sweep {output.name}", job="sweep", config=settings)
    log_report(loggers, report, output / "report")
    log_models(loggers, used=args.parents)
    finish_loggers(loggers)
    print(f"\n{output}: sweep.csv, report/report.html, report/report.md")


def build_parser(task: TaskName = "image-classification") -> ArgumentParser:
    """The options of the command for parents of a task: those of fuse.py, and what is swept."""
    parser = fusing_parser(task)
    parser.add_argument("--sweep", nargs="+", type=str, default=[], help="KEY=VALUE,VALUE,... of fuse options")
    return parser


def grid(sweeps: Sequence[str]) -> list[Cell]:
    """Every combination of `KEY=v1,v2` strings; values are read as YAML.

    Raises:
        FusionError: a string without a key or values.
    """
    if not sweeps:
        raise FusionError("nothing to sweep; give --sweep KEY=V1,V2, for example --sweep align.reg=0.02,0.08")
    axes = []
    for sweep in sweeps:
        key, equals, values = sweep.partition("=")
        if not (key and equals and values):
            raise FusionError(f"--sweep '{sweep}': write KEY=V1,V2, for example align.reg=0.02,0.08")
        axes.append([(key, yaml.safe_load(value)) for value in values.split(",")])
    return [dict(combination) for combination in itertools.product(*axes)]


def label(cell: Cell) -> str:
    """`residual=skip reg=0.02`: the cell's name in tables."""
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in cell.items())


def passes(configs: Mapping[str, FuseConfig], count: int) -> list[dict[str, FuseConfig]]:
    """Groups cells that one calibration pass can serve: same anchor, samples, tokens, depth and kind of stream."""
    groups: dict[tuple[Any, ...], dict[str, FuseConfig]] = defaultdict(dict)
    for name, config in configs.items():
        anchor = resolve_anchor(config, count)
        collected = replace(config.calibration, scale="none"), config.align.stream, config.strategy, config.depth
        groups[anchor, *collected][name] = config
    return list(groups.values())


def _scores(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: metrics[key] for key in ("accuracy", "loss", "perplexity") if key in metrics}


if __name__ == "__main__":
    sys.exit(main(run))
