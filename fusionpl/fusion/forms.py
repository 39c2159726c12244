"""The form in which a parent is fused, and whether it computes what the parent does."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusionpl.calibration.cursor import CalibrationSet
from fusionpl.calibration.forward import eval_mode
from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.errors import FusionError
from fusionpl.families import canonical
from fusionpl.families.apply import State
from fusionpl.families.binding import bind
from fusionpl.families.canonical import inseparable, without_scales
from fusionpl.families.family import Family
from fusionpl.families.proof import PROOF_TOLERANCE, changed_a_little
from fusionpl.fusion.config import FuseConfig
from fusionpl.fusion.target import untie
from fusionpl.transport.products import full_float32

# Of language models one text: it has many tokens, and each of them as many outputs as there are words.
_SAMPLES, _TEXTS = 8, 1


def check_forms(networks: Sequence[SectionedModel], config: FuseConfig, data: CalibrationSet) -> None:
    """Checks that parents in the form in which they are fused compute what they did: samples of the first batch go
    through both, section by section, with one section of one parent in memory at a time.

    Args:
        networks: the parents, in the form that the method takes them in.
        config: what they are fused under.
        data: the calibration set; of several ranks the first one's samples decide for all.

    Raises:
        FusionError: one does not; names the section behind which it departs first, and what to use instead.
    """
    problem = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        problem = next(filter(None, (departure(network, data[0]) for network in networks)), None)
    if dist.is_initialized():
        shared = [problem]
        dist.broadcast_object_list(shared, src=0)
        (problem,) = shared
    if problem is not None:
        raise FusionError(f"{problem}; use {_instead(config)}")


def departure(network: SectionedModel, batch: Mapping[str, Tensor]) -> str | None:
    """Where a network in its form departs from the model that it is made of; None where it does not.

    Args:
        network: in the form in which it is fused.
        batch: model inputs, of which a few samples are taken.
    """
    form = network.original
    if not _folds(form):
        return None
    count = _SAMPLES if "classes" in form.binding.axes else _TEXTS
    few = {key: value[:count] for key, value in batch.items()}
    own = SectionedModel(form.module, form.binding, form.name, read=_Once(form), device=form.device, float32=True)
    centred, first, error = form.binding.family.norm == "pre", None, 0.0
    with full_float32(), eval_mode(form.module):
        for (section, before), (_, after) in zip(own.walk(few), own.prepared(form.prepare).walk(few), strict=True):
            stream = section != form.binding.sections[-1]
            error = _apart(before, after, centred=centred and stream)
            if not error <= PROOF_TOLERANCE and first is None:
                first = section
    if error <= PROOF_TOLERANCE:
        return None
    return (
        f"{form.name}: folding {_folded(form)} for the fusion changes its outputs by {error:.1e} of their size, first "
        f"in section '{first}'"
    )


def folding_error(
    model: nn.Module, run: Callable[[nn.Module], Tensor], *, family: Family | None = None
) -> tuple[float, float, str]:
    """Folds all of a model that its family allows, and compares what it puts out.

    All weights are first changed a little: norms and biases that nobody has trained would hide a mistake.

    Args:
        model: the model.
        run: gives its outputs.
        family: see `bind`.

    Returns:
        The largest difference of outputs, the largest output, and what was folded.
    """
    changed = changed_a_little(model)
    network = untie(SectionedModel(changed, bind(changed, family)))
    form = network.prepared(without_scales if inseparable(network.binding) else canonical)
    with torch.inference_mode():
        before, after = run(changed), run(form.whole())
    return float((before - after).abs().max()), float(before.abs().max()), _folded(form)


def _folds(form: SectionedModel) -> bool:
    """Whether anything is folded."""
    scales = any(slot.gain == "scale" for slot in form.binding.slots)
    return form.prepare is canonical or (form.prepare is not None and scales)


def _folded(form: SectionedModel) -> str:
    return (
        "norms into what reads them, and scales," if form.prepare is canonical else "scales into the maps before them"
    )


def _instead(config: FuseConfig) -> str:
    """What to use where a form is not the same function."""
    if config.strategy == "joint":
        return "strategy transport"
    if config.canonical:
        return "align.stream transport with align.residual tie and align.solver assignment"
    return "refit.method none"


def _apart(before: Tensor, after: Tensor, *, centred: bool) -> float:
    """The largest difference, as a share of the largest number; that of streams about their mean over units, which a
    canonical form leaves out."""
    if centred:
        before, after = (one - one.mean(-1, keepdim=True) for one in (before, after))
    finite = before.isfinite()  # scores that are ruled out may be infinite
    before, after = before[finite], after[finite]
    size = before.abs().max() if before.numel() else torch.zeros(())
    return float((before - after).abs().max() / size) if size > 0 else 0.0


class _Once:
    """Reads the parameters of a network, and holds those of one section, so that two forms of it read them once.

    Args:
        network: whose they are.
    """

    def __init__(self, network: SectionedModel) -> None:
        self._network, self._section, self._held = network, "", State()

    def __call__(self, name: str) -> Tensor:
        section = self._network.binding.owners[name]
        if section != self._section:
            self._section, self._held = section, State()
        if name not in self._held:
            self._held[name] = self._network.read(name)
        return self._held[name]
