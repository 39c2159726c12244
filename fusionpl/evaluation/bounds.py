"""What a fused model of parents with data of their own lies between."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from fusionpl.calibration.cursor import CalibrationSet
from fusionpl.evaluation.bench import Cost, Made
from fusionpl.families.family import Family
from fusionpl.fusion.heads import HeadFit, can_fit_heads
from fusionpl.fusion.voting import Voting


@dataclass(frozen=True)
class Bounds:
    """The best of the parents once its head is fitted to what each says on its own data, and all of them side by side
    with one head that is fitted alike.

    Attributes:
        best: index of the parent.
        fitted: that parent with its head fitted, and what fitting all parents' heads took.
        validation: its figure, by which it was chosen; None without validation data.
        ceiling: all side by side, and what that took; None where that head is too large.
    """

    best: int
    fitted: Made
    validation: float | None
    ceiling: Made | None


def bounds_of(
    models: Sequence[nn.Module],
    votings: Sequence[Voting],
    calibration: CalibrationSet,
    validated: Callable[[nn.Module], float | None],
    family: Family | None = None,
    *,
    more: bool = True,
) -> Bounds | None:
    """Fits the head of each parent, and one for all.

    Args:
        models: the parents, with the outputs of all, where they are run.
        votings: who says what they are to predict.
        calibration: the data of each parent.
        validated: the figure of a model on validation data; None without such data, where the parent is the best that
            is nearest to what the parents say on samples that were left out of the fit.
        family: the models', where the library does not say.
        more: whether more of that figure is better; of a loss less is.

    Returns:
        None where they have no head to fit.
    """
    if not can_fit_heads(models, family):
        return None
    started = time.monotonic()
    heads = HeadFit(models, votings, calibration, family)
    fits = [heads.fitted(index) for index in range(len(models))]
    figures = [validated(model) for model, _ in fits]
    losses = [fit.after if figure is None else -figure if more else figure
              for figure, (_, fit) in zip(figures, fits, strict=True)]  # fmt: skip
    best = min(range(len(models)), key=losses.__getitem__)
    fitted = fits[best][0], Cost("unlabelled data", time.monotonic() - started)
    started = time.monotonic()
    every = heads.side_by_side() if heads.can_fit_one_for_all else None
    ceiling = None if every is None else (every, Cost("unlabelled data", time.monotonic() - started))
    return Bounds(best, fitted, figures[best], ceiling)
