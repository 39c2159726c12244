"""What a command advises to do next: commands that can be pasted as they stand."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from fusionpl.cli.alternatives import DISTILLED
from fusionpl.cli.finetune import Asked as AskedToFinetune
from fusionpl.cli.fuse import Asked as AskedToFuse
from fusionpl.evaluation.outcomes import SHARES
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import judged_metric, known
from fusionpl.evaluation.steps import Step
from fusionpl.evaluation.verdict import LEVEL, LOST, WON
from fusionpl.fusion.config import FuseConfig
from fusionpl.models.hub import named
from fusionpl.options import SETTINGS, settings_in
from fusionpl.training.tasks import TASKS

OTHER_DATA = "parents that each saw other data (train.py --data.classes, --data.path) have more to give each other"
WIDER, FACTOR = 1.5, 8  # what is tried first, and the largest `width` that is a factor and no number of units


def after_training(folder: Path) -> list[Step]:
    """A parent alone is not fused: with another run beside it that learned the same task it is, else one is trained."""
    settings = settings_in(folder)
    task, model = settings["task"], settings["model"]
    beside = [run for run in sorted(folder.parent.iterdir()) if run != folder and (run / "model").is_dir()]
    others = [run for run in beside if (other := settings_in(run)).get("model") == model and other.get("task") == task]
    if others:
        return [Step("one network of both", ("fuse", "--parents", str(others[-1]), str(folder)))]
    seed = settings["seed"] + 1
    words = ["train", "--config", str(folder / SETTINGS), "--seed", str(seed)]
    if folder != Path(f"runs/{settings['name']}/seed-{settings['seed']}"):
        words += ["--output", f"{folder}-seed-{seed}"]
    return [Step("another parent; with other data (--data.path, --data.classes) it has more to give", tuple(words))]


def after_fusion(report: Report, asked: AskedToFuse, config: FuseConfig) -> list[Step]:
    """What follows a fusion, by its verdict.

    Args:
        report: of the fusion.
        asked: what the command line asked for.
        config: how it was fused, with what `auto` came to.
    """
    output, args = asked.output, asked.args
    trains = TASKS[args.task].trains
    finetuned = Step("a short finetuning of it, beside the best parent", ("finetune", "--model", str(output)))
    outcome = report.outcome("one-shot")
    if outcome in (WON, None):
        beside = ("evaluate", "--models", str(output), *args.parents)
        return [finetuned if trains else Step("its figures beside the parents'", beside)]
    steps = _wider(output, asked.settings, config.strategy)
    if outcome == LOST and report.head_fitted and config.strategy != "head":
        sizes = [word for key in ("width", "depth") if asked.settings.get(key) for word in (f"--{key}", "null")]
        best = _again(output, "head", "--strategy", "head", *sizes)
        steps = [Step("the best parent with its head fitted, as a model", best), *steps]
    elif outcome == LOST and (path := asked.parents.get(report.best or "")):
        steps = [Step("the parent to keep, and what it can", ("evaluate", "--models", path)), *steps]
    if outcome == LEVEL and trains and DISTILLED not in asked.alternatives:
        distilled = _again(output, DISTILLED, "--compare", DISTILLED)
        steps.append(Step("whether distilling all into the best parent does better in the same time", distilled))
    if not args.own_data:
        steps.append(Step(OTHER_DATA))
    return steps or [finetuned]


def after_finetuning(report: Report, asked: AskedToFinetune) -> list[Step]:
    """What follows a finetuning: its figures beside the parent's, a wider fusion where it did not pay."""
    model, origin = Path(asked.options.model), asked.origin
    outcome = report.outcome("finetuned")
    parents: Mapping[str, str] = named(origin.get("parents", []))
    if outcome in (LEVEL, LOST) and (steps := _wider(model, origin, origin.get("strategy", "auto"))):
        return steps
    if asked.heads:
        return [
            Step(
                "one of its models alone",
                ("evaluate", "--models", str(asked.folder / next(iter(asked.heads.values())).name)),
            )
        ]
    beside = parents.get(report.best or "", str(model))
    return [
        Step("its figures beside those of what it was made of", ("evaluate", "--models", str(asked.folder), beside))
    ]


def after_evaluation(report: Report, options: Namespace) -> list[Step]:
    """Several models of one task may be fused."""
    fused = any("parents" in settings_in(model) for model in options.models)
    if len(options.models) > 1 and not fused:
        return [Step("what fusing them is worth", ("fuse", "--parents", *options.models))]
    return []


def after_sweep(report: Report, commands: Mapping[str, Sequence[str]]) -> list[Step]:
    """The best cell as a fusion of its own.

    Args:
        report: of the sweep.
        commands: cell -> the command that makes its model, in words.
    """
    metric = judged_metric(report.rows)
    cells = [row for row in report.rows if row.name in commands and known(getattr(row, metric))]
    if not cells:
        return []
    best = (max if metric in SHARES else min)(cells, key=lambda row: getattr(row, metric))
    return [Step(f"the best of {len(commands)} by the test data", tuple(commands[best.name]))]


def _again(output: Path, name: str, *changes: str) -> tuple[str, ...]:
    """The fusion of a folder again, with some options changed, into a folder beside it."""
    first = re.sub(r"-(width-[\d.]+|distilled|head)$", "", output.name)
    beside = output.with_name(f"{first}-{name}")
    return ("fuse", "--config", str(output / SETTINGS), *changes, "--output", str(beside))


def _wider(output: Path, settings: Mapping[str, Any], strategy: str) -> list[Step]:
    """The same parents in a wider stream, where that has one; parents that were matched unit by unit in one stream.

    Args:
        output: of the fusion.
        settings: of it.
        strategy: what it came to.
    """
    asked, width = settings.get("strategy", "auto"), settings.get("width") or 1
    if asked == "transport":  # which the options of aligning may hold it to
        words = ("fuse", "--parents", *settings["parents"], "--output", str(output.with_name(f"{output.name}-default")))
        return [Step("the default method, one stream for all parents", words)]
    if strategy == "transport":  # as the family has no stream of all
        return []
    if width + 0.5 > FACTOR:
        return []
    wider = f"{max(WIDER, width + 0.5):g}"
    changes = ["--strategy", "auto"] if strategy == "head" else []
    return [
        Step(
            "a wider network, with room for more of each parent",
            _again(output, f"width-{wider}", *changes, "--width", wider),
        )
    ]
