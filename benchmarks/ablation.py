"""One-shot accuracy on digits by every choice of the paper, over pairs of parents; nothing is trained.

    python -m benchmarks.ablation --runs runs/benchmark --output docs/results/ablation.md

The parents are those of benchmarks.beyond. Each block varies one choice of conf/fuse/paper.yaml.
"""

import argparse
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.common import EXACT, PAIRS, PAPER, WEIGHTS, Parents, mean_and_deviation, plain_average
from fusionpl.cli.common import quiet
from fusionpl.cli.sweep import passes
from fusionpl.evaluation import evaluate, evaluate_ensemble
from fusionpl.fusion import Calibrated, load_config

HARD: dict[str, Any] = {"align.solver": "emd"}
RESIDUALS = ("average", "branch", "skip", "identity", "weighted_scalar", "weighted_matrix", "tie")
BLOCKS: dict[str, dict[str, dict[str, Any]]] = {
    "Residual policy (Sinkhorn 0.08)": {name: {"align.residual": name} for name in RESIDUALS},
    "Residual policy (EMD)": {f"{name}, EMD": {"align.residual": name, **HARD} for name in RESIDUALS},
    "Solver and regularisation": {
        **{f"Sinkhorn {reg}": {"align.reg": reg} for reg in (0.01, 0.02, 0.04, 0.06, 0.08, 0.12, 0.2)},
        "EMD": HARD,
        "assignment": {"align.solver": "assignment"},
    },
    "Evidence": {
        "activations, Sinkhorn 0.08 ": {},
        "activations, EMD": HARD,
        "weights, Sinkhorn 0.06": WEIGHTS,
        "weights, EMD": {**WEIGHTS, **HARD},
    },
    "Q and K": {name: {"align.qk": name} for name in ("separate", "shared", "joint")},
    "Heads": {
        "flat": {},
        "matched": {"align.heads": "matched"},
        "flat, EMD": HARD,
        "matched, EMD": {"align.heads": "matched", **HARD},
        "flat, weights 0.06": WEIGHTS,
        "matched, weights 0.06": {**WEIGHTS, "align.heads": "matched"},
    },
    "Tokens": {name: {"calibration.tokens": name} for name in ("all", "class", "mean", "window:6", "window:2")},
    "Functions preserved exactly": {
        "tie, matched heads, assignment": EXACT,
        "the same from weights": {**WEIGHTS, **EXACT},
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/ablation.md"))
    args = parser.parse_args()
    quiet()
    cells = {
        (block, name): load_config(PAPER, options) for block, rows in BLOCKS.items() for name, options in rows.items()
    }
    scores: dict[Any, list[float]] = defaultdict(list)
    trained = Parents("vit-digits.yaml", args.runs)
    data = trained.data()
    test, calibration = list(data.test_dataloader()), list(data.calibration_dataloader())
    for pair in PAIRS:
        names = [f"seed-{seed}" for seed in pair]
        parents = trained.models(pair)
        scores["parents, mean"].append(statistics.mean(evaluate(model, test)["accuracy"] for model in parents))
        scores["ensemble"].append(evaluate_ensemble(parents, test)["accuracy"])
        scores["vanilla"].append(evaluate(plain_average(parents), test)["accuracy"])
        labels = {str(key): key for key in cells}
        for group in passes({label: cells[key] for label, key in labels.items()}, 2):
            calibrated = Calibrated(parents, calibration, list(group.values()), names=names)
            for label, config in group.items():
                fused = calibrated.fuse(config).model
                scores[labels[label]].append(evaluate(fused, test)["accuracy"])
                print(pair, label, scores[labels[label]][-1], flush=True)
    lines = [f"One-shot test accuracy on digits, mean ± standard deviation over {len(PAIRS)} pairs of seeds.", ""]
    lines += [f"{name}: {mean_and_deviation(scores[name])}  " for name in ("parents, mean", "ensemble", "vanilla")]
    for block, rows in BLOCKS.items():
        lines += ["", f"### {block}", "", "| | one-shot |", "|---|---|"]
        lines += [f"| {name} | {mean_and_deviation(scores[block, name])} |" for name in rows]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("\n".join(lines) + "\n")
    print(args.output.read_text())


if __name__ == "__main__":
    main()
