"""One parent whose head alone is fitted to what all parents predict: the cheapest thing that a fusion has to beat."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from fusionpl.calibration.cursor import CalibrationSet
from fusionpl.calibration.forward import eval_mode, logits
from fusionpl.calibration.kept import Store
from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.errors import FusionError
from fusionpl.families.binding import bind
from fusionpl.families.family import TAIL, VOCABULARY, Family, attribute
from fusionpl.fusion.fitting import held_out, predicting
from fusionpl.fusion.target import untie
from fusionpl.fusion.teaching import mean_of
from fusionpl.fusion.voting import Voting
from fusionpl.models.classes import whole_heads
from fusionpl.models.labels import NUMBERS, TAGS, kind_of
from fusionpl.transport.least_squares import fit_numbers
from fusionpl.transport.softmax import LARGEST, Fitted, fit_softmax, log_mean, spread


def fit_head(
    model: nn.Module,
    models: Sequence[nn.Module],
    votings: Sequence[Voting],
    data: CalibrationSet,
    *,
    family: Family | None = None,
) -> tuple[nn.Module, Fitted] | None:
    """A copy of a model whose last linear map is fitted to what all models predict together, without labels.

    A decoder that is the embedding comes apart from it.

    Args:
        model: one of the models.
        models, votings, data, family: see `HeadFit`.

    Returns:
        The model, where it was, and what the fit found; None where no linear map puts predictions out last.
    """
    if not can_fit_heads(models, family):
        return None
    heads = HeadFit(models, votings, data, family)
    return heads.fitted(next(index for index, one in enumerate(models) if one is model))


def best_head(
    models: Sequence[nn.Module],
    votings: Sequence[Voting],
    data: CalibrationSet,
    *,
    family: Family | None = None,
    among: Sequence[int] | None = None,
) -> tuple[int, nn.Module, Fitted]:
    """Of models whose heads are fitted, the one that predicts held-out samples most as all do together.

    Args:
        models, votings, data, family: see `HeadFit`.
        among: the indices of those that may be it; None for all.

    Returns:
        Its index, the model, and what its fit found.

    Raises:
        FusionError: these models have no head to fit.
    """
    if not can_fit_heads(models, family):
        raise FusionError(
            "these models have no linear map of their own that puts out classes or tokens last, so there is no head to "
            "fit; fuse them as they are"
        )
    heads = HeadFit(models, votings, data, family)
    fits = {index: heads.fitted(index) for index in among or range(len(models))}
    index = min(fits, key=lambda at: fits[at][1].after)
    return index, *fits[index]


def can_fit_heads(models: Sequence[nn.Module], family: Family | None = None) -> bool:
    """Whether one linear map puts out the probabilities of each model, of as many classes or tokens."""
    names = [head_of(model, family) for model in models]
    if any(name is None for name in names) or any(
        attribute(model, "config.final_logit_softcapping") for model in models
    ):
        return False
    if any(kind_of(model) == NUMBERS for model in models):
        return False
    shapes = {
        model.get_submodule(str(name)).get_parameter("weight").shape for model, name in zip(models, names, strict=True)
    }
    if any(shape.numel() > LARGEST for shape in shapes):
        return False
    sizes = {shape[0] for shape in shapes}
    return len(sizes) == 1 and (sizes != {1} or kind_of(models[0]) == TAGS)


class HeadFit:
    """What the heads of models read, kept so that any of them, or one for all side by side, can be fitted to what all
    predict.

    Args:
        models: of which `can_fit_heads` is true.
        votings: who says what they are to predict.
        data: calibration batches; under torch.distributed this rank's.
        family: the models', where the library does not say.
    """

    def __init__(
        self, models: Sequence[nn.Module], votings: Sequence[Voting], data: CalibrationSet, family: Family | None = None
    ) -> None:
        self._models, self._votings, self._data, self._family = models, votings, data, family
        self._names = [str(head_of(model, family)) for model in models]
        self._heads = [
            cast(nn.Linear, model.get_submodule(name)) for model, name in zip(models, self._names, strict=True)
        ]
        self._read = Store[int, tuple[list[Tensor], Tensor]](data.kept, "heads")
        mask = bind(models[0], family).family.stacks[-1].mask
        count = 0
        with torch.no_grad(), eval_mode(*models):
            for index in data:
                batch = data[index]
                read_by = [read(model, head, batch) for model, head in zip(models, self._heads, strict=True)]
                count += read_by[0][..., 0].numel()
                self._read[index] = read_by, predicting(models[0], read_by[0], batch.get(mask))
        self._step = spread(count, self._heads[0].weight.numel())

    def fitted(self, index: int) -> tuple[nn.Module, Fitted]:
        """A copy of a model with its head fitted, and what the fit found.

        Args:
            index: which model.
        """
        model = self._models[index]
        student = whole_heads(untie(SectionedModel(model, bind(model, self._family), "the model")).whole())
        head = cast(nn.Linear, student.get_submodule(self._names[index]))
        with torch.no_grad():
            fit = self._fit([index], _matrix(head))
            # New ones: those of the model are shared.
            head.weight = nn.Parameter(fit.matrix[:-1].T.to(head.weight).contiguous())
            if head.bias is not None:
                head.bias = nn.Parameter(fit.matrix[-1].to(head.bias))
        return student, fit

    @property
    def can_fit_one_for_all(self) -> bool:
        """Whether the head of all models side by side is small enough to be fitted."""
        return sum(head.weight.numel() for head in self._heads) <= LARGEST

    def side_by_side(self) -> nn.Module:
        """All models side by side with one head that reads what each of theirs does: what a fused model of one's size
        is not expected to pass."""
        matrices = [_matrix(head) for head in self._heads]
        prior = torch.cat([matrix[:-1] for matrix in matrices]) / len(matrices)
        bias = torch.stack([matrix[-1] for matrix in matrices]).mean(0, keepdim=True)
        with torch.no_grad():
            fit = self._fit(range(len(self._models)), torch.cat([prior, bias]))
        return SideBySide(self._models, self._heads, fit.matrix)

    def _fit(self, trunks: Sequence[int], prior: Tensor) -> Fitted:
        fits = [self._voted(trunks, voting, prior[:, voting.columns]) for voting in self._votings]
        if len(fits) == 1:
            return fits[0]
        matrix = prior.clone()
        for voting, fit in zip(self._votings, fits, strict=True):
            matrix[:, voting.columns] = fit.matrix
        before, after = (sum(getattr(fit, name) for fit in fits) / len(fits) for name in ("before", "after"))
        return Fitted(matrix, max(fit.penalty for fit in fits), before, after)

    def _voted(self, trunks: Sequence[int], voting: Voting, prior: Tensor) -> Fitted:
        rows, held = (partial(self._rows, trunks, voting, part) for part in range(2))
        reduce = self._data.sum_over_ranks
        if voting.kind == NUMBERS:
            return fit_numbers(rows, held, prior, reduce=reduce)
        return fit_softmax(rows, held, prior, link=voting.link, reduce=reduce)

    def _rows(self, trunks: Sequence[int], voting: Voting, part: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        for batch in self._data:
            if not (voters := voting.voters(self._data.owners[batch])):
                continue
            read_by, counts = self._read[batch]
            x = read_by[trunks[0]]
            here = held_out(self._data.firsts[batch], len(x)).view(-1, *[1] * (x.ndim - 2)) == bool(part)
            at = (counts & here).flatten().nonzero()[:: self._step, 0].to(x.device)
            rows = [inputs.flatten(0, -2)[at] for inputs in read_by]
            given = [self._heads[index](rows[index])[:, voting.columns] for index in voters]
            weights = list(voters.values())
            numbers = voting.kind == NUMBERS
            wanted = mean_of(given, weights, NUMBERS) if numbers else log_mean(given, weights, voting.link).exp()
            yield torch.cat([rows[index] for index in trunks], dim=-1), wanted, self._data.weight(batch)


class SideBySide(nn.Module):
    """Models whose features, side by side, one head reads.

    Args:
        models: with a linear head each.
        heads: theirs.
        matrix: of the one head, with the constant in the last row, [sum of features + 1, classes].
    """

    def __init__(self, models: Sequence[nn.Module], heads: Sequence[nn.Linear], matrix: Tensor) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.matrix = nn.Parameter(matrix.float(), requires_grad=False)
        self._heads = heads
        if hasattr(models[0], "config_class"):  # by which a model of transformers is told
            self.config_class, self.config = models[0].config_class, models[0].config

    def forward(self, *args: Tensor, **keywords: Tensor) -> Tensor:
        """The logits."""
        batch = keywords or {"pixel_values": args[0]}
        x = torch.cat([read(model, head, batch) for model, head in zip(self.models, self._heads, strict=True)], dim=-1)
        logits: Tensor = x @ self.matrix[:-1].to(x) + self.matrix[-1].to(x)
        return logits


def _matrix(head: nn.Linear) -> Tensor:
    """Weight and, in the last row, bias, [n + 1, classes], float64."""
    weight = head.weight.detach()
    bias = torch.zeros_like(weight[:, 0]) if head.bias is None else head.bias.detach()
    return torch.cat([weight.T, bias[None]]).double()


def head_of(model: nn.Module, family: Family | None = None) -> str | None:
    """The linear module that puts out classes or tokens, also where it is the embedding; None where there is none, or
    several."""
    names = {
        slot.parameter.rpartition(".")[0]
        for slot in untie(SectionedModel(model, bind(model, family), "the model")).binding.slots
        if slot.section == TAIL and any(slot.reads) and {*slot.axes} & {"classes", VOCABULARY}
    }
    return names.pop() if len(names) == 1 else None


def read(model: nn.Module, reader: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What a module of a model reads of a batch."""
    inputs: list[Tensor] = []
    handle = reader.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        logits(model, batch)
    finally:
        handle.remove()
    return inputs[0]
