"""The settings of the fusion that the tables compare: name -> what each changes of a preset, or the whole of it."""

from typing import Any

from benchmarks.common import EXACT, JOINT, PAPER, TRANSPORT, WEIGHTS
from fusionpl.fusion.config import FuseConfig, load_config

VARIANTS: dict[str, FuseConfig] = {
    "OT weights soft": load_config(PAPER, WEIGHTS),
    "OT activations soft": load_config(PAPER),
    "OT activations EMD": load_config(PAPER, {"align.solver": "emd"}),
    "transport + refit": load_config(TRANSPORT),
    "one stream": load_config(JOINT),
}

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
        "activations, Sinkhorn 0.08": {},
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

ALL = 100_000  # more calibration samples than any scale has
ALL_SAMPLES: dict[str, Any] = {"calibration.samples": ALL}
TOKENS: dict[str, Any] = {**ALL_SAMPLES, "anchor": 0, "calibration.tokens": "all"}
ALIGNMENTS: dict[str, dict[str, Any]] = {
    "paper, soft": ALL_SAMPLES,
    "paper, EMD": {**ALL_SAMPLES, **HARD},
    "soft 0.02, all tokens, anchor 0": {**TOKENS, "align.reg": 0.02},
    "soft 0.02, residual skip": {**TOKENS, "align.reg": 0.02, "align.residual": "skip"},
    "permutations": {**TOKENS, **EXACT},
    "rotation": {**TOKENS, **EXACT, "align.stream": "rotation", "align.scaling": "two_sided"},
}
