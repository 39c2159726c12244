"""One parent whose head alone is fitted to what all parents predict: the cheapest thing that a fusion has to beat."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fusionpl.calibration.forward import eval_mode, logits
from fusionpl.calibration.kept import Kept, budget
from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.errors import FusionError
from fusionpl.families.binding import bind
from fusionpl.families.family import TAIL, VOCABULARY, Family, attribute
from fusionpl.fusion.fitting import held_out, predicting
from fusionpl.fusion.target import untie
from fusionpl.models.labels import NUMBERS, TAGS, kind_of
from fusionpl.transport.softmax import LARGEST, Fitted, Link, Reduce, fit_softmax, log_mean, spread


def fit_head(
    model: nn.Module,
    models: Sequence[nn.Module],
    weights: Sequence[float | Tensor],
    samples: Iterable[tuple[int, Mapping[str, Tensor]]],
    *,
    family: Family | None = None,
    memory: float | None = None,
) -> tuple[nn.Module, Fitted] | None:
    """A copy of a model whose last linear map is fitted to the mean of all models' probabilities, without labels.

    A decoder that is the embedding comes apart from it.

    Args:
        model: one of the models.
        models, weights, samples, family: see `HeadFit`.
        memory: GiB that what heads read may take; what exceeds it goes to a temporary file.

    Returns:
        The model, where it was, and what the fit found; None where no linear map puts predictions out last.
    """
    if not can_fit_heads(models, family):
        return None
    heads = HeadFit(models, weights, samples, Kept(budget(memory)), family)
    return heads.fitted(next(index for index, one in enumerate(models) if one is model))


def best_head(
    models: Sequence[nn.Module],
    weights: Sequence[float | Tensor],
    samples: Iterable[tuple[int, Mapping[str, Tensor]]],
    *,
    family: Family | None = None,
    memory: float | None = None,
    reduce: Reduce = lambda sums: None,
    among: Sequence[int] | None = None,
) -> tuple[int, nn.Module, Fitted]:
    """Of models whose heads are fitted, the one that predicts held-out samples most as all do together.

    Args:
        models, weights, samples, family: see `HeadFit`.
        memory: see `fit_head`.
        reduce: see `HeadFit.fitted`.
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
    heads = HeadFit(models, weights, samples, Kept(budget(memory)), family)
    fits = {index: heads.fitted(index, reduce) for index in among or range(len(models))}
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
    """What the heads of models read, kept so that any of them can be fitted to what all predict.

    Args:
        models: of which `can_fit_heads` is true.
        weights: one a model, or for each of its tags [tags], summing to 1.
        samples: batches, each with the number of its first sample; under torch.distributed this rank's.
        kept: where what heads read is kept.
        family: the models', where the library does not say.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        weights: Sequence[float | Tensor],
        samples: Iterable[tuple[int, Mapping[str, Tensor]]],
        kept: Kept,
        family: Family | None = None,
    ) -> None:
        self._models, self._weights, self._kept, self._family = models, weights, kept, family
        self._link: Link = "sigmoid" if kind_of(models[0]) == TAGS else "softmax"
        self._names = [str(head_of(model, family)) for model in models]
        self._heads = [
            cast(nn.Linear, model.get_submodule(name)) for model, name in zip(models, self._names, strict=True)
        ]
        mask = bind(models[0], family).family.stacks[-1].mask
        self._firsts: list[int] = []
        count = 0
        with torch.no_grad(), eval_mode(*models):
            for index, (first, batch) in enumerate(samples):
                self._firsts.append(first)
                read_by = [read(model, head, batch) for model, head in zip(models, self._heads, strict=True)]
                count += read_by[0][..., 0].numel()
                kept["heads", index] = read_by, predicting(models[0], read_by[0], batch.get(mask))
        self._step = spread(count, self._heads[0].weight.numel())

    def fitted(self, index: int, reduce: Reduce = lambda sums: None) -> tuple[nn.Module, Fitted]:
        """A copy of a model with its head fitted, and what the fit found.

        Args:
            index: which model.
            reduce: adds up tensors over the processes, in place, where each has samples of its own.
        """
        model = self._models[index]
        student = untie(SectionedModel(model, bind(model, self._family), "the model")).whole()
        head = cast(nn.Linear, student.get_submodule(self._names[index]))
        with torch.no_grad():
            bias = torch.zeros_like(head.weight[:, 0]) if head.bias is None else head.bias
            prior = torch.cat([head.weight.T, bias[None]]).double()
            fit = fit_softmax(
                lambda: self._rows(index, 0), lambda: self._rows(index, 1), prior, link=self._link, reduce=reduce
            )
            # New ones: those of the model are shared.
            head.weight = nn.Parameter(fit.matrix[:-1].T.to(head.weight).contiguous())
            if head.bias is not None:
                head.bias = nn.Parameter(fit.matrix[-1].to(head.bias))
        return student, fit

    def _rows(self, index: int, part: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch, first in enumerate(self._firsts):
            read_by, counts = self._kept["heads", batch]
            x = read_by[index]
            here = held_out(first, len(x)).view(-1, *[1] * (x.ndim - 2)) == bool(part)
            at = (counts & here).flatten().nonzero()[:: self._step, 0].to(x.device)
            given = [head(inputs.flatten(0, -2)[at]) for head, inputs in zip(self._heads, read_by, strict=True)]
            yield x.flatten(0, -2)[at], log_mean(given, self._weights, self._link).exp()


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
