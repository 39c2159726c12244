"""Digits, over pairs of seeds: parents, ensemble, vanilla fusion, OT soft and hard; one-shot and finetuned.

    python -m benchmarks.digits --runs runs/benchmark --output docs/results/digits.md

Parents that are already in --runs are used as they are; the rest is trained.
"""

import argparse
import copy
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import lightning as L
from torch import nn

from fusionpl.cli import train
from fusionpl.cli.common import CONF, quiet
from fusionpl.datamodules import DataConfig, ImageDataModule
from fusionpl.evaluation import evaluate, evaluate_ensemble
from fusionpl.fusion import FuseConfig, fuse, load_config, vanilla
from fusionpl.models import load_model
from fusionpl.training import OptimConfig, fit

# Three parents make three pairs: each parent is in two of them.
PAIRS = ((1, 2), (2, 3), (3, 1))
PARENT_EPOCHS, FINETUNE_EPOCHS = 30, 3
PAPER = CONF / "fuse" / "paper.yaml"
VARIANTS: Mapping[str, FuseConfig] = {
    "OT soft (paper)": load_config(PAPER),
    "OT hard (paper, EMD)": load_config(PAPER, {"align.solver": "emd"}),
    "OT soft, residual skip": load_config(PAPER, {"align.residual": "skip"}),
    "OT weights soft (0.06)": load_config(PAPER, {"align.evidence": "weights", "align.reg": 0.06}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/digits.md"))
    args = parser.parse_args()
    quiet()
    table: dict[tuple[str, str], list[float]] = defaultdict(list)
    for first, second in PAIRS:
        parents = [parent(args.runs, seed) for seed in (first, second)]
        cache = args.runs / f"pair-{first}-{second}.json"
        if not cache.is_file():
            cache.write_text(json.dumps([[*key, value] for key, value in measured(parents, first, args.runs).items()]))
        for name, stage, value in json.loads(cache.read_text()):
            table[name, stage].append(value)
    lines = [
        f"| mean and standard deviation over {len(PAIRS)} pairs | one-shot | after {FINETUNE_EPOCHS} epochs |",
        "|---|---|---|",
    ]
    for name in dict.fromkeys(name for name, _ in table):
        lines.append(f"| {name} | {cell(table.get((name, 'one-shot')))} | {cell(table.get((name, 'finetuned')))} |")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("\n".join(lines) + "\n")
    print(args.output.read_text())


def parent(runs: Path, seed: int) -> nn.Module:
    folder = runs / f"seed-{seed}"
    if not (folder / "model").is_dir():
        train.run(["--seed", str(seed), "--output", str(folder), "--overwrite", "--logger", "csv"])
    return load_model(folder)


def measured(parents: list[nn.Module], seed: int, runs: Path) -> dict[tuple[str, str], float]:
    data = ImageDataModule(DataConfig())
    test, calibration = list(data.test_dataloader()), list(data.calibration_dataloader())
    scores = [evaluate(model, test)["accuracy"] for model in parents]
    best = parents[scores.index(max(scores))]
    plain = vanilla(parents, [0.5, 0.5])
    assert plain is not None
    models = {"best parent": best, "vanilla": plain}
    models |= {name: fuse(parents, calibration, config).model for name, config in VARIANTS.items()}
    found = {
        ("parents, mean", "one-shot"): statistics.mean(scores),
        ("ensemble", "one-shot"): evaluate_ensemble(parents, test)["accuracy"],
    }
    for name, model in models.items():
        found[name, "one-shot"] = evaluate(model, test)["accuracy"]
        found[name, "finetuned"] = finetuned(copy.deepcopy(model), seed, runs / "finetuned" / name)
        print(f"{name}: {found[name, 'one-shot']:.4f} one-shot, {found[name, 'finetuned']:.4f} finetuned", flush=True)
    return found


def finetuned(model: nn.Module, seed: int, folder: Path) -> float:
    L.seed_everything(seed, verbose=False)
    data = ImageDataModule(DataConfig(shift=4), seed)
    optim = OptimConfig(lr=5e-4)
    trainer = {"max_epochs": FINETUNE_EPOCHS, "gradient_clip_val": 1.0, "enable_progress_bar": False}
    return fit(model, data, optim, trainer, folder, seed=seed).figures["accuracy"]


def cell(values: list[float] | None) -> str:
    if not values:
        return ""
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f} %"


if __name__ == "__main__":
    main()
