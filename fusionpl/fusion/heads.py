"""One parent whose head alone is fitted to what all parents predict: the cheapest thing that a fusion has to beat."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fusionpl.calibration import Kept, Network, budget, eval_mode, logits
from fusionpl.errors import FusionError
from fusionpl.families import TAIL, VOCABULARY, Family, attribute, bind
from fusionpl.fusion.goal import parted
from fusionpl.fusion.refit import held_out, predicting
from fusionpl.models import NUMBERS, TAGS, kind_of
from fusionpl.transport import Fitted, Link, Reduce, fit_softmax, log_mean


def fit_head(
    model: nn.Module,
    teachers: Sequence[nn.Module],
    weights: Sequence[float | Tensor],
    samples: Iterable[tuple[int, Mapping[str, Tensor]]],
    *,
    family: Family | None = None,
    memory: float | None = None,
    reduce: Reduce = lambda sums: None,
) -> tuple[nn.Module, Fitted] | None:
    """A copy of a model whose last linear map is fitted to the mean of the teachers' probabilities, without labels.

    A decoder that is the embedding comes apart from it.

    Args:
        model: of a family with classes or tokens to predict.
        teachers: models of the same outputs, `model` among them.
        weights: one a teacher, or for each of its tags [tags], summing to 1.
        samples: the number of each batch's first sample, and the batch: see `batches`.
        family: of the models, where the library does not say.
        memory: GiB that what heads read may take; what exceeds it goes to a temporary file.
        reduce: adds up tensors over the processes, in place.

    Returns:
        The model, where it was, and what the fit found; None where no linear map puts predictions out last.
    """
    names = [head_of(one, family) for one in teachers]
    if any(name is None for name in names) or attribute(model, "config.final_logit_softcapping"):
        return None
    apart = parted(Network(model, bind(model, family), "the model"))
    student, mask = apart.whole(), apart.binding.family.stacks[-1].mask
    readers = [one.get_submodule(str(name)) for one, name in zip((student, *teachers), (names[0], *names), strict=True)]
    head, kind = cast(nn.Linear, readers[0]), kind_of(model)
    if kind == NUMBERS:
        return None
    link: Link = "sigmoid" if kind == TAGS else "softmax"
    kept, firsts = Kept(budget(memory)), []
    with torch.no_grad(), eval_mode(*teachers):
        for index, (first, batch) in enumerate(samples):
            firsts.append(first)
            x, *others = (read(one, reader, batch) for one, reader in zip((student, *teachers), readers, strict=True))
            kept[index] = x, others, predicting(student, x, batch.get(mask))

        def rows(part: int) -> Iterator[tuple[Tensor, Tensor]]:
            for index, first in enumerate(firsts):
                x, others, counts = kept[index]
                here = held_out(first, len(x)).view(-1, *[1] * (x.ndim - 2)) == bool(part)
                at = (counts & here).flatten().nonzero()[:, 0].to(x.device)
                given = [reader(one.flatten(0, -2)[at]) for reader, one in zip(readers[1:], others, strict=True)]
                yield x.flatten(0, -2)[at], log_mean(given, weights, link).exp()

        bias = torch.zeros_like(head.weight[:, 0]) if head.bias is None else head.bias
        prior = torch.cat([head.weight.T, bias[None]]).double()
        fit = fit_softmax(lambda: rows(0), lambda: rows(1), prior, link=link, reduce=reduce)
        # New ones: those of the model are shared.
        head.weight = nn.Parameter(fit.matrix[:-1].T.to(head.weight).contiguous())
        if head.bias is not None:
            head.bias = nn.Parameter(fit.matrix[-1].to(head.bias))
    return student, fit


def best_head(
    models: Sequence[nn.Module],
    weights: Sequence[float | Tensor],
    samples: Sequence[tuple[int, Mapping[str, Tensor]]],
    **options: Any,
) -> tuple[int, nn.Module, Fitted]:
    """Of models whose heads are fitted, the one that predicts held-out samples most as all do together.

    Args:
        models: the parents.
        weights, samples, options: see `fit_head`.

    Returns:
        Its index, the model, and what its fit found.

    Raises:
        FusionError: these models have no head to fit.
    """
    found = [one for model in models if (one := fit_head(model, models, weights, samples, **options)) is not None]
    if len(found) < len(models):
        raise FusionError(
            "these models have no linear map that puts out classes or tokens last, so there is no head to fit"
        )
    index = min(range(len(found)), key=lambda at: found[at][1].after)
    return index, *found[index]


def head_of(model: nn.Module, family: Family | None = None) -> str | None:
    """The linear module that puts out classes or tokens, also where it is the embedding; None where there is none, or
    several."""
    names = {
        slot.parameter.rpartition(".")[0]
        for slot in parted(Network(model, bind(model, family), "the model")).binding.slots
        if slot.section == TAIL and any(slot.reads) and {*slot.axes} & {"classes", VOCABULARY}
    }
    return names.pop() if len(names) == 1 else None


def read(model: nn.Module, reader: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What a module of a model reads of a batch."""
    found: list[Tensor] = []
    handle = reader.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        logits(model, batch)
    finally:
        handle.remove()
    return found[0]
