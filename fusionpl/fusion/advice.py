"""What parents are to each other, before any work, and what a minute is best spent on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fusionpl.calibration.cursor import CalibrationSet
from fusionpl.calibration.forward import eval_mode, logits
from fusionpl.families.binding import bind
from fusionpl.families.family import Family
from fusionpl.fusion.answers import log_probabilities
from fusionpl.fusion.heads import best_head
from fusionpl.fusion.survey import APART, divergence
from fusionpl.fusion.units import SPECIALISED
from fusionpl.fusion.voting import Voting
from fusionpl.models.labels import CLASSES, kind_of

ADVISED = 300  # samples
# Nats of divergence from the ensemble below which a head-fitted parent all but is the ensemble.
NEAR = 0.02


@dataclass(frozen=True)
class Advice:
    """What a few hundred samples, without labels, show of parents.

    Attributes:
        share: how much of what classifiers disagree about is how often each class occurs, see `specialisation`; None of
            other models.
        parent: the name of the parent whose predictions are nearest to the mean of all once its head is fitted.
        before, after: the divergence of its predictions of held-out samples from that mean, in nats, without and with
            the fitted head.
        base: whether parents share one.
    """

    share: float | None
    parent: str
    before: float
    after: float
    base: bool

    @property
    def lines(self) -> list[str]:
        """What the parents are, what there is to gain, and the command."""
        return [f"parents: {self._who}", f"to gain: {self._gain}", f"advice: {self._command}"]

    @property
    def _who(self) -> str:
        if self.base:
            return "they share one base"
        if self.share is None:
            return "trained apart"
        why = f"{self.share:.1%} of their disagreement is about how often each class occurs"
        kind = (
            "other classes" if self.share >= APART else "other data" if self.share >= SPECIALISED else "the same data"
        )
        return f"trained apart, on {kind} ({why})"

    @property
    def _gain(self) -> str:
        return (
            f"the predictions of {self.parent} are {self.before:.3f} nats away from the mean of all, "
            f"{self.after:.3f} with its head alone fitted; so much is left for a fused model"
        )

    @property
    def _command(self) -> str:
        if self.base:
            return "average them: the row vanilla of a report is that; a fusion is seldom better"
        if self.after < NEAR:
            fitted = " with its head fitted: --strategy head" if self.after < self.before else " as it is"
            return f"keep {self.parent}{fitted}"
        if self.share is not None and self.share < SPECIALISED:
            return "--refine.minutes 1, or --width 1.5 where a larger model will do; else --strategy head"
        return "fuse them as they are; --refine.minutes 1 makes more of it"


@torch.no_grad()
def advise(
    models: Sequence[nn.Module],
    names: Sequence[str],
    votings: Sequence[Voting],
    data: CalibrationSet,
    *,
    base: bool = False,
    family: Family | None = None,
) -> Advice:
    """Looks at parents on a few samples.

    Args:
        models: the parents, with one numbering of classes or tokens.
        names: what messages call them.
        votings, data, family: see `HeadFit`.
        base: whether they share one, see `kinship`.

    Raises:
        FusionError: these models have no head to fit.
    """
    index, _, fit = best_head(models, votings, data, family=family)
    share = None
    if kind_of(models[0]) == CLASSES and "classes" in bind(models[0], family).axes:
        with eval_mode(*models):
            shown = [
                torch.stack([log_probabilities(logits(one, data[batch]), CLASSES).exp().double() for one in models])
                for batch in data
            ]
        whole = torch.cat([one.flatten(1, -2) for one in shown], dim=1)
        total = float(divergence(whole).mean())
        share = float(divergence(whole.mean(1))) / total if total > 0 else 0.0
    return Advice(share, names[index], fit.before, fit.after, base)
