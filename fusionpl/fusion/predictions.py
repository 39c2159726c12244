"""What puts out predictions, fitted to those of the parents."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fusionpl.families.family import attribute
from fusionpl.fusion.fitting import Fit, Section, decoder_of, rows_of, shown
from fusionpl.fusion.groups import LinearGroup
from fusionpl.fusion.teaching import mean_of
from fusionpl.fusion.voting import Voting
from fusionpl.models.labels import NUMBERS
from fusionpl.transport.least_squares import fit_numbers
from fusionpl.transport.softmax import LARGEST, fit_softmax, log_mean, spread


def fit_predictions(fit: Fit, section: Section, group: LinearGroup, start: Tensor) -> Tensor:
    """Fits what puts out predictions to those of the parents, on the data of one of them to its own.

    Classes and tags are fitted to the mean of probabilities by `fit_softmax`, numbers to their mean by least squares.
    Of parents that know other classes, who are sure of a wrong one where they know none, the mean is half and half:
    which of them is surer then decides, and that is in the log of the mean, which least squares fit. Where the data say
    whose they are, nothing is half and half.

    Args:
        fit, section, group: see `fit_group`.
        start: where the fit starts, [n + 1, m].
    """
    matrix = start.clone()
    for voting in fit.votings:
        if voting.kind == NUMBERS and not fit.data.owned and voting.head is None:
            continue  # the start is that
        matrix[:, voting.columns] = _fitted(fit, section, group, voting, start[:, voting.columns])
    return matrix


def _fitted(fit: Fit, section: Section, group: LinearGroup, voting: Voting, start: Tensor) -> Tensor:
    decoders = {index: decoder_of(section, group, index) for index in range(len(section.parents)) if group.narrow}
    count = sum(fit.data.predicting[batch][..., 0].numel() for batch in fit.data)
    step = spread(count, start.numel())

    def means(part: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        """What goes in, and the logs of mean probabilities, or the means of numbers."""
        for batch in fit.data:
            if not (voters := voting.voters(fit.data.owners[batch])):
                continue
            x = fit.data.predicting[batch]
            at = rows_of(fit, group, x, batch)[part][::step]
            given = []
            for index in voters:
                own = shown(fit, section, group, index, batch).flatten(0, -2)[at].float()
                given.append((_outputs(own, decoders[index]) if group.narrow else own)[:, voting.columns])
            weights = list(voters.values())
            numbers = voting.kind == NUMBERS
            mean = mean_of(given, weights, NUMBERS) if numbers else log_mean(given, weights, voting.link)
            yield x.flatten(0, -2)[at], mean, fit.data.weight(batch)

    def rows(part: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        return ((x, log.exp(), weight) for x, log, weight in means(part))

    options: dict[str, Any] = {"both": not fit.trial, "reduce": fit.data.sum_over_ranks}
    if voting.kind == NUMBERS:
        return fit_numbers(lambda: means(0), lambda: means(1), start, **options).matrix
    if fit.apart and not fit.data.owned:
        # Less their means over the classes, which change no prediction.
        prior = start - start.mean(1, keepdim=True)
        return fit_numbers(lambda: _centred(means(0)), lambda: _centred(means(1)), prior, **options).matrix
    return fit_softmax(lambda: rows(0), lambda: rows(1), start, link=voting.link, **options).matrix


def beyond_a_fit(fit: Fit, section: Section, group: LinearGroup) -> bool:
    """Whether predictions are not what the last linear map puts out, or parents lack tokens, whose rows are the
    anchor's, or there are too many weights."""
    capped = attribute(fit.module, "config.final_logit_softcapping")
    lacking = any(parent.network.missing_tokens is not None for parent in section.parents)
    modules = (fit.module.get_submodule(name) for name in group.modules)
    entries = sum(module.get_parameter("weight").numel() for module in modules)
    return bool(capped) or lacking or entries > LARGEST


def _centred(rows: Iterable[tuple[Tensor, Tensor, float]]) -> Iterator[tuple[Tensor, Tensor, float]]:
    return ((x, y - y.mean(-1, keepdim=True), weight) for x, y, weight in rows)


def _outputs(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.addmm(matrix[-1].to(x), x, matrix[:-1].to(x))
