"""One parent whose head alone is fitted to what all parents predict: the cheapest thing that a fusion has to beat."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fusionpl.calibration import CalibrationConfig, Kept, Network, batches, budget, eval_mode, logits
from fusionpl.families import TAIL, VOCABULARY, Binding, attribute, bind
from fusionpl.fusion.goal import parted
from fusionpl.fusion.refit import held_out, predicting
from fusionpl.transport import Fitted, fit_softmax, log_mean


def fit_head(
    model: nn.Module,
    teachers: Sequence[nn.Module],
    weights: Sequence[float],
    calibration: Iterable[Any],
    config: CalibrationConfig,
) -> tuple[nn.Module, Fitted] | None:
    """A copy of a model whose last linear map is fitted to the mean of the teachers' probabilities, without labels.

    A decoder that is the embedding comes apart from it.

    Args:
        model: of a family with classes or tokens to predict.
        teachers: models of the same outputs, `model` among them.
        weights: one a teacher, summing to 1.
        calibration: any iterable of batches.
        config: its `samples` and `batch_size` count.

    Returns:
        The model, where it was, and what the fit found; None where no linear map puts predictions out last.
    """
    networks = [Network(one, bind(one), "a model") for one in (model, *teachers)]
    networks[0] = parted(networks[0])
    names = [head_of(network.binding) for network in networks]
    if any(name is None for name in names) or attribute(model, "config.final_logit_softcapping"):
        return None
    student = networks[0].whole()
    readers = [one.get_submodule(str(name)) for one, name in zip((student, *teachers), names, strict=True)]
    head = cast(nn.Linear, readers[0])
    if len(head.weight) == 1:  # a number
        return None
    kept, firsts = Kept(budget(config.memory)), []
    with torch.no_grad(), eval_mode(*teachers):
        for index, (first, batch) in enumerate(batches(calibration, config)):
            firsts.append(first)
            x, *others = (_read(one, reader, batch) for one, reader in zip((student, *teachers), readers, strict=True))
            counts = predicting(student, x, batch.get(networks[0].binding.family.stacks[-1].mask))
            kept[index] = x, others, counts

        def rows(part: int) -> Iterator[tuple[Tensor, Tensor]]:
            for index, first in enumerate(firsts):
                x, others, counts = kept[index]
                here = held_out(first, len(x)).view(-1, *[1] * (x.ndim - 2)) == bool(part)
                at = (counts & here).flatten().nonzero()[:, 0].to(x.device)
                given = [reader(one.flatten(0, -2)[at]) for reader, one in zip(readers[1:], others, strict=True)]
                yield x.flatten(0, -2)[at], log_mean(given, weights).exp()

        bias = torch.zeros_like(head.weight[:, 0]) if head.bias is None else head.bias
        fit = fit_softmax(lambda: rows(0), lambda: rows(1), torch.cat([head.weight.T, bias[None]]).double())
        head.weight.copy_(fit.matrix[:-1].T)
        if head.bias is not None:
            head.bias.copy_(fit.matrix[-1])
    return student, fit


def head_of(binding: Binding) -> str | None:
    """The linear module that puts out classes or tokens; None where there is none, or several."""
    names = {
        slot.parameter.rpartition(".")[0]
        for slot in binding.slots
        if slot.section == TAIL
        and any(slot.reads)
        and any(
            axis in ("classes", VOCABULARY) and not reads for axis, reads in zip(slot.axes, slot.reads, strict=True)
        )
    }
    return names.pop() if len(names) == 1 else None


def _read(model: nn.Module, reader: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What a module of a model reads of a batch."""
    found: list[Tensor] = []
    handle = reader.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        logits(model, batch)
    finally:
        handle.remove()
    return found[0]
