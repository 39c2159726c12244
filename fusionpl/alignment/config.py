"""Options of alignment; the names are those of the paper's ablations."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fusionpl.errors import FusionError, check_choices
from fusionpl.transport.names import Metric, Normalize, Scaling, Solver

if TYPE_CHECKING:
    from fusionpl.families.axes import Binding

Residual = Literal["auto", "average", "branch", "skip", "identity", "weighted_scalar", "weighted_matrix", "tie"]


@dataclass(frozen=True)
class AlignConfig:
    """How a parent's units are matched with the anchor's.

    Attributes:
        evidence: what describes a unit: its `activations`, or its incoming `weights`.
        metric: ground metric between units.
        normalize: what the cost matrix is divided by (`log`: log(1 + cost)).
        solver: `sinkhorn` (soft), `emd` (hard, any widths), `assignment` (hard, equal widths).
        reg: Sinkhorn's entropic regularisation, in units of the normalised cost.
        residual: the map of a residual stream from skip s and branch b: `average` (s + b) / 2, `branch`, `skip`,
            `identity`, `weighted_scalar` and `weighted_matrix` (by the anchor's mean absolute activations, for the
            whole stream or unit by unit), `tie` (one map for the whole stream); `auto` is `tie` for post-LN families,
            for embeddings that are tied to a decoder at the other end of the stream, and for rotations, else `average`.
        qk: Q and K take maps of their own (`separate`, the paper), one map from both (`shared`), or one map over the
            units of both (`joint`).
        heads: `flat` aligns the units of all heads together; `matched` assigns heads first, then units inside each
            matched pair, with one map for Q and K and one for V and O. Rotary heads and groups of heads, whose units
            nothing else keeps, are always matched.
        stream: `transport`, or `rotation`: one orthogonal map for the whole stream and one for each circuit of each
            matched pair of heads (pre-LN families); `solver` then serves the MLP units alone.
        scaling: `two_sided` or, as the paper's released code, `source`; they differ for unequal widths only.
        embeddings, classifier: false takes the anchor's tensors instead of the average.
    """

    evidence: Literal["activations", "weights"] = "activations"
    metric: Metric = "euclidean"
    normalize: Normalize = "max"
    solver: Solver = "sinkhorn"
    reg: float = 0.08
    residual: Residual = "average"
    qk: Literal["separate", "shared", "joint"] = "separate"
    heads: Literal["flat", "matched"] = "flat"
    stream: Literal["transport", "rotation"] = "transport"
    scaling: Scaling = "two_sided"
    embeddings: bool = True
    classifier: bool = True

    def __post_init__(self) -> None:
        """Raises FusionError for options that are out of range or contradict each other."""
        check_choices(self, "align")
        if not (math.isfinite(self.reg) and self.reg > 0):
            raise FusionError(f"align.reg must be above 0, not {self.reg}; for an exact plan use align.solver emd")
        if self.stream != "rotation":
            return
        needed = {"evidence": "activations", "residual": "tie", "heads": "matched", "scaling": "two_sided"}
        values = {key: getattr(self, key) for key in needed} | ({"residual": "tie"} if self.residual == "auto" else {})
        missing = [f"align.{key} {value}" for key, value in needed.items() if values[key] != value]
        if missing:
            raise FusionError(
                "align.stream rotation is one map for the whole stream and one for each matched pair of heads, from "
                f"activations; it needs {', '.join(missing)}"
            )


def residual_of(config: AlignConfig, binding: "Binding") -> Residual:
    """The residual policy for a model: what `auto` stands for."""
    if config.residual != "auto":
        return config.residual
    tied = config.stream == "rotation" or binding.family.norm == "post" or binding.closed
    return "tie" if tied else "average"
