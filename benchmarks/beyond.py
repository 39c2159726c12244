"""Beyond the paper: alignment x refit, one-shot and after a short finetuning, over pairs of seeds.

    python -m benchmarks.beyond digits --runs runs/benchmark --output docs/results/digits.md
    python -m benchmarks.beyond cifar10 --runs runs/cifar10 --output docs/results/cifar10.md \
        --data.path ../shared/data/cifar10

Parents and cells that are in --runs are used as they are, so a run that was stopped goes on.
"""

import argparse
import copy
import platform
import shlex
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from torch import nn

from benchmarks.common import (
    DEFAULT,
    EXACT,
    PAIRS,
    PAPER,
    Figures,
    Parents,
    finetuned,
    markdown,
    mean_and_deviation,
    plain_average,
)
from fusionpl.calibration import CalibrationConfig
from fusionpl.cli.common import quiet
from fusionpl.evaluation import evaluate, evaluate_ensemble
from fusionpl.families import bind
from fusionpl.fusion import AlignedParent, fuse, load_config
from fusionpl.fusion.refit import refit
from fusionpl.training import fuse as fuse_and_refine

TOKENS: dict[str, Any] = {"anchor": 0, "calibration.tokens": "all", "calibration.samples": 100_000}
ALIGNMENTS: dict[str, dict[str, Any]] = {
    "paper, soft": {"calibration.samples": 100_000},
    "paper, EMD": {"calibration.samples": 100_000, "align.solver": "emd"},
    "soft 0.02, all tokens, anchor 0": {**TOKENS, "align.reg": 0.02},
    "soft 0.02, residual skip": {**TOKENS, "align.reg": 0.02, "align.residual": "skip"},
    "permutations": {**TOKENS, **EXACT},
    "rotation": {**TOKENS, **EXACT, "align.stream": "rotation", "align.scaling": "two_sided"},
}
SAMPLES = (50, 100, 200, 500)
SETTINGS = {
    "digits": ("vit-digits.yaml", 3),
    "cifar10": ("vit-cifar10-small.yaml", 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=len(PAIRS), help="how many pairs of seeds")
    args, options = parser.parse_known_args()
    quiet()
    preset, epochs = SETTINGS[args.setting]
    parents = Parents(preset, args.runs, tuple(options))
    one_shot: dict[str, list[float]] = defaultdict(list)
    finally_: dict[str, list[float]] = defaultdict(list)
    pairs = PAIRS[: args.pairs]
    for pair in pairs:
        for name, figures in measured(parents, pair, epochs).items():
            one_shot[name].append(figures["accuracy"])
            if "finetuned" in figures:
                finally_[name].append(figures["finetuned"])
    rows = [[name, mean_and_deviation(one_shot[name]), mean_and_deviation(finally_[name])] for name in one_shot]
    text = (
        f"Test accuracy on {args.setting}, mean ± standard deviation over {len(pairs)} pair(s) of seeds. Refits use "
        f"all calibration samples where no number is given (default.yaml: at most 512); no labels, "
        f"no gradients. {platform.processor() or 'CPU'}, "
        f"`{shlex.join(['python', '-m', 'benchmarks.beyond', *sys.argv[1:]])}`\n\n"
        + markdown(["", "one-shot", f"after {epochs} epochs of finetuning"], rows)
    )
    plot(one_shot, args.output.parent.parent / "img" / f"beyond-{args.setting}.png")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text + "\n")
    print(text)


def measured(parents: Parents, pair: tuple[int, int], epochs: int) -> dict[str, Figures]:
    data = parents.data(pair[0])
    test, calibration = list(data.test_dataloader()), list(data.calibration_dataloader())
    models = parents.models(pair)
    found: dict[str, Figures] = {}

    def add(name: str, model: Any, *, finetune: bool = False) -> None:
        def measure() -> dict[str, float]:
            one: nn.Module = model() if callable(model) and not isinstance(model, nn.Module) else model
            figures = {"accuracy": evaluate(one, test)["accuracy"]}
            if finetune:
                after = finetuned(
                    one, data, "image-classification", "default.yaml",
                    seed=pair[0], epochs=epochs,
                )  # fmt: skip
                figures["finetuned"] = after["accuracy"]
            return figures

        found[name] = parents.cell(f"{pair[0]}-{pair[1]} {name}", measure)

    def mean() -> dict[str, float]:
        return {"accuracy": statistics.mean(evaluate(model, test)["accuracy"] for model in models)}

    found["parents, mean"] = parents.cell(f"{pair[0]}-{pair[1]} parents", mean)
    found["ensemble"] = parents.cell(f"{pair[0]}-{pair[1]} ensemble", lambda: evaluate_ensemble(models, test))
    best = max(models, key=lambda model: evaluate(model, test)["accuracy"])
    add("best parent", best, finetune=True)
    add("vanilla", plain_average(models), finetune=True)
    add("vanilla + refit", lambda: unaligned(models, calibration))
    for name, changes in ALIGNMENTS.items():
        config = load_config(PAPER, changes)
        add(name, lambda config=config: fuse(models, calibration, config).model, finetune=name.startswith("paper"))
        better = load_config(PAPER, {**changes, "refit.method": "ridge"})
        add(f"{name} + refit", lambda config=better: fuse(models, calibration, config).model)
    add("default.yaml", lambda: fuse(models, calibration, load_config(DEFAULT)).model, finetune=True)
    for samples in SAMPLES:
        if samples < sum(len(batch["labels"]) for batch in calibration):
            config = load_config(DEFAULT, {"calibration.samples": samples})
            add(f"default.yaml, {samples} samples", lambda config=config: fuse(models, calibration, config).model)
    config = load_config(DEFAULT, {"refine.method": "gradient"})
    add("default.yaml + refine", lambda: fuse_and_refine(models, calibration, config).model, finetune=True)
    return found


def plot(one_shot: dict[str, list[float]], file: Path) -> None:
    """Bars: each alignment averaged and refitted, with the parents' mean and their ensemble as lines."""
    names = ["vanilla", *ALIGNMENTS]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for offset, (label, suffix) in zip((-0.2, 0.2), (("average", ""), ("average, refitted", " + refit")), strict=True):
        values = [one_shot[name + suffix] for name in names]
        heights = [100 * statistics.mean(found) for found in values]
        spread = [100 * (statistics.stdev(found) if len(found) > 1 else 0.0) for found in values]
        bars = axes.bar([index + offset for index in range(len(names))], heights, 0.38, yerr=spread, label=label)
        axes.bar_label(bars, fmt="%.0f", label_type="center", color="white", fontsize=8)
    for name, style in (("parents, mean", "--"), ("ensemble", ":")):
        axes.axhline(100 * statistics.mean(one_shot[name]), color="0.3", linestyle=style, linewidth=1, label=name)
    axes.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize=8)
    axes.set_ylabel("one-shot test accuracy (%)")
    axes.margins(y=0.02)
    figure.legend(ncols=4, loc="outside upper center", frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def unaligned(models: list[nn.Module], calibration: list[Any]) -> nn.Module:
    """The refit alone: what it is worth without any alignment."""
    model = plain_average(models)
    parents = [AlignedParent(copy.deepcopy(parent), bind(parent), None, 0.5) for parent in models]
    refit(model, bind(model), parents, calibration, CalibrationConfig(samples=100_000))
    return model


if __name__ == "__main__":
    main()
