"""What puts out predictions, fitted to the mean of the parents' probabilities."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fusionpl.calibration.cursor import sum_over_ranks
from fusionpl.families.family import attribute
from fusionpl.fusion.fitting import Fit, Section, decoder_of, rows_of, shown
from fusionpl.fusion.groups import LinearGroup
from fusionpl.models.labels import TAGS
from fusionpl.transport.least_squares import NormalEquations, fit_ridge
from fusionpl.transport.softmax import LARGEST, Link, fit_softmax, log_mean, spread


def fit_predictions(fit: Fit, section: Section, group: LinearGroup, start: Tensor) -> Tensor:
    """Fits what puts out predictions to the mean of the parents' probabilities, or on the data of one of them to its
    own: see `fit_softmax`.

    Of parents that know other classes, who are sure of a wrong one where they know none, the mean is half and half:
    which of them is surer then decides, and that is in the log of the mean, which least squares fit. Where the data say
    whose they are, nothing is half and half.

    Args:
        fit, section, group: see `fit_group`.
        start: where the fit starts, [n + 1, m].
    """
    decoders = {index: decoder_of(section, group, index) for index in range(len(section.parents)) if group.narrow}
    link: Link = "sigmoid" if fit.kind == TAGS else "softmax"
    count = sum(fit.data.predicting[batch][..., 0].numel() for batch in fit.data)
    step = spread(count, start.numel())

    def logs(part: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        for batch in fit.data:
            x, weights = fit.data.predicting[batch], fit.voting.on(fit.data.owners[batch])
            at = rows_of(fit, group, x, batch)[part][::step]
            given = []
            for index in range(len(section.parents)):
                own = shown(fit, section, group, index, batch).flatten(0, -2)[at].float()
                given.append(_outputs(own, decoders[index]) if group.narrow else own)
            yield x.flatten(0, -2)[at], log_mean(given, weights, link), fit.data.weight(batch)

    def rows(part: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        return ((x, log.exp(), weight) for x, log, weight in logs(part))

    if fit.apart and not fit.data.owned:
        return _fit_logs(fit, logs, start)
    return fit_softmax(
        lambda: rows(0), lambda: rows(1), start, link=link, both=not fit.trial,
        reduce=fit.data.sum_over_ranks,
    ).matrix  # fmt: skip


def beyond_a_fit(fit: Fit, section: Section, group: LinearGroup) -> bool:
    """Whether predictions are not what the last linear map puts out, or parents lack tokens, whose rows are the
    anchor's, or there are too many weights."""
    capped = attribute(fit.module, "config.final_logit_softcapping")
    lacking = any(parent.network.missing_tokens is not None for parent in section.parents)
    modules = (fit.module.get_submodule(name) for name in group.modules)
    entries = sum(module.get_parameter("weight").numel() for module in modules)
    return bool(capped) or lacking or entries > LARGEST


def _fit_logs(fit: Fit, logs: Callable[[int], Iterator[tuple[Tensor, Tensor, float]]], start: Tensor) -> Tensor:
    """Least squares of log-probabilities, less their means over the classes, which change no prediction."""
    parts = [NormalEquations.zeros(len(start) - 1, start.shape[1], device=start.device) for _ in range(2)]
    for part, equations in enumerate(parts):
        for x, log, weight in logs(part):
            equations.update(x, log - log.mean(-1, keepdim=True), weight=weight)
    sum_over_ranks([tensor for part in parts for tensor in part.tensors()])
    fitted, choosing = parts
    return fit_ridge(fitted, choosing, start - start.mean(1, keepdim=True), both=not fit.trial)[0]


def _outputs(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.addmm(matrix[-1].to(x), x, matrix[:-1].to(x))
