"""Learned refinement: a model is drawn to its parents' mean on unlabelled data, as far as held-out samples say that it
helps.

A short race chooses what is taught and how fast. What is kept is the nearest to the parents' mean of all that was
looked at: the start, a few points on the way of the teaching, and a few on the straight line of weights from the start
to its end. So the divergence on held-out samples never rises.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusionpl.calibration.batches import Progress, no_progress
from fusionpl.calibration.cursor import CalibrationSet, sum_over_ranks
from fusionpl.calibration.forward import device_of
from fusionpl.calibration.kept import Kept, budget
from fusionpl.errors import FusionError
from fusionpl.families.axes import Binding
from fusionpl.fusion.config import RACE, FuseConfig, RefineConfig
from fusionpl.fusion.heads import HeadFit, can_fit_heads
from fusionpl.fusion.parents import AlignedParent
from fusionpl.fusion.teaching import Augment, Teaching
from fusionpl.fusion.unlabelled import Unlabelled
from fusionpl.schedule import Clock

RATES = (1e-4, 3e-4, 3e-5)  # of AdamW; the first wins where none is nearer
QUARTERS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Taught:
    """What a refinement made.

    Attributes:
        model: in eval mode.
        parent: the index of the parent whose architecture it has; None where it was taught from the fused model.
        summary: what was chosen, in one line.
    """

    model: nn.Module
    parent: int | None
    summary: str


@dataclass(frozen=True)
class Start:
    """What may be taught, and its divergence from the parents' mean on held-out samples."""

    name: str
    model: nn.Module
    parent: int | None
    divergence: float


@dataclass(frozen=True)
class Entrant:
    """A start with a learning rate, and the divergence that it reached in the race."""

    start: Start
    lr: float
    reached: float


def check_start(config: FuseConfig, models: Sequence[nn.Module], binding: Binding) -> None:
    """Raises FusionError where refinement is to start from a parent, and no head of one can be fitted."""
    if config.refine.asked and config.refine.start == "parent" and not can_fit_heads(models, binding.family):
        raise FusionError(
            "refine.start parent fits the linear map that puts out classes or tokens, and these parents have none, or "
            "several; use refine.start fused"
        )


def refine(
    model: nn.Module,
    binding: Binding,
    parents: Sequence[AlignedParent],
    data: CalibrationSet,
    config: FuseConfig,
    *,
    more: Iterable[Any] | None = None,
    augment: Augment | None = None,
    seed: int = 0,
    tags: Sequence[Tensor] | None = None,
    progress: Progress = no_progress,
) -> Taught:
    """Unlabelled distillation of the parents into what they were fused to, or into the best of them.

    Under torch.distributed all ranks choose the same, and the first rank's clock counts; see `Teaching`.

    Args:
        model: the fused one; it stays as it is.
        binding: the model's.
        parents: the teachers, with their weights.
        data: this rank's calibration batches.
        config: its `refine` says how.
        more: what is taught on besides the calibration set; see `Unlabelled`.
        augment, seed: see `Teaching`.
        tags: the teachers' weights for each tag, [tags] each, in place of their own; see `Team.tag_weights`.
        progress: wraps the steps.

    Raises:
        FusionError: see `Unlabelled`.
    """
    device, asked = device_of(model), config.refine
    course = _Course(asked, device)
    samples = Unlabelled(data, more, asked.samples, device)
    teachers = [parent.network.original.whole() for parent in parents]
    weights: Sequence[float | Tensor] = tags or [parent.weight for parent in parents]
    mask = binding.family.stacks[-1].mask
    teaching = Teaching(teachers, weights, mask, samples, asked.batch_size, augment, seed)
    starts = []
    if asked.start != "parent":
        starts.append(Start("the fused model", model, None, teaching.divergence(model)))
    if asked.start != "fused" and (found := _best_parent(parents, weights, data, config, teaching)) is not None:
        starts.append(found)
    rates = RATES if asked.lr is None else (asked.lr,)
    entrants = [Entrant(start, lr, start.divergence) for lr in rates for start in starts]
    winner = _race(entrants, teaching, course, progress)
    kept = _Nearest(winner.start, teaching)
    student = copy.deepcopy(winner.start.model)
    finite = teaching.run(student, winner.lr, progress(course.rest(teaching), "refine"), kept.on_the_way(student))
    kept.look_back(student)
    others = [start for start in starts if start is not winner.start]
    summary = _summary(winner, kept, others, finite=finite)
    kept.give(student)
    return Taught(student, winner.start.parent, summary)


def _best_parent(
    parents: Sequence[AlignedParent],
    weights: Sequence[float | Tensor],
    data: CalibrationSet,
    config: FuseConfig,
    teaching: Teaching,
) -> Start | None:
    """The parent that predicts held-out samples best once its head is fitted; None where a model of another width or
    depth is asked for, or none has a head of that kind and all tokens of the anchor."""
    family = parents[0].binding.family
    whole = [index for index, parent in enumerate(parents) if parent.network.missing_tokens is None]
    plain = [parent.network.original.prepared(None).whole() for parent in parents]  # as trained, in no canonical form
    if (config.width, config.depth) != (None, None) or not whole or not can_fit_heads(plain, family):
        return None
    numbered = ((data.firsts[index], data[index]) for index in data)
    heads = HeadFit(plain, weights, numbered, Kept(budget(config.calibration.memory)), family)
    fits = {index: heads.fitted(index, lambda sums: sum_over_ranks([*sums])) for index in whole}
    best = min(whole, key=lambda index: fits[index][1].after)
    model = copy.deepcopy(fits[best][0]).eval()  # which shares its parameters with the parent
    return Start(f"{parents[best].network.name} with its head fitted", model, best, teaching.divergence(model))


def _race(entrants: list[Entrant], teaching: Teaching, course: "_Course", progress: Progress) -> Entrant:
    """Teaches all for a little while, the nearer half twice as long, and so on; each time from the start."""
    rounds = (len(entrants) - 1).bit_length()
    for number in range(rounds):
        part, reached = 1 / rounds / len(entrants), []
        for place, entrant in enumerate(progress(entrants, "race")):
            model, until = copy.deepcopy(entrant.start.model), number / rounds + (place + 1) * part
            teaching.run(model, entrant.lr, course.heat(part, until, teaching))
            # What makes a start worse leaves it as it is.
            found = [entrant.start.divergence, teaching.divergence(model)]
            reached.append(replace(entrant, reached=min(one for one in found if not math.isnan(one))))
        entrants = sorted(reached, key=lambda one: one.reached)[: (len(entrants) + 1) // 2]
    return entrants[0]


class _Course:
    """How long a refinement takes, in steps or by the first rank's clock.

    Args:
        config: says so.
        device: where ranks exchange what the clock shows.
    """

    def __init__(self, config: RefineConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._seconds = None if config.minutes is None else 60 * config.minutes
        self._started = time.monotonic()
        self._race: float | None = None  # when it began

    def heat(self, part: float, until: float, teaching: Teaching) -> Iterable[float]:
        """The steps of one entrant; before each the share of them that is over.

        Args:
            part: of the race.
            until: the share of the race that is over then.
            teaching: knows how long it takes to look at the result, which counts.
        """
        if self._seconds is None:
            return _by_steps(max(1, round(RACE * part * self._config.planned)))
        now = time.monotonic() - self._started
        self._race = now if self._race is None else self._race
        end = self._race + RACE * until * (self._seconds - self._race)
        return _by_clock(end - now - teaching.seconds, self._device)

    def rest(self, teaching: Teaching) -> Iterable[float]:
        """The steps of the teaching itself."""
        if self._seconds is None:
            return _by_steps(self._config.planned)
        left = self._seconds - (time.monotonic() - self._started)
        looks = (len(QUARTERS) + 1) * teaching.seconds
        return _by_clock(left - min(looks, left / 2), self._device)


def _by_steps(count: int) -> Iterable[float]:
    """The middle of each step, so that none has a learning rate of 0."""
    return [(step + 0.5) / count for step in range(count)]


def _by_clock(seconds: float, device: torch.device) -> Iterator[float]:
    clock = Clock(max(seconds, 1e-9))
    while True:
        share = torch.tensor(clock.share, device=device)
        if dist.is_initialized():
            dist.broadcast(share, 0)
        if share >= 1:
            return
        yield float(share)


class _Nearest:
    """The nearest weights to the teachers' mean that were looked at, the start among them.

    Args:
        start: where the teaching starts.
        teaching: measures.
    """

    def __init__(self, start: Start, teaching: Teaching) -> None:
        self._start, self._teaching = start, teaching
        self.divergence, self.where = start.divergence, "the start is kept"
        self._state: dict[str, Tensor] | None = None

    def look(self, model: nn.Module, where: str) -> None:
        """Measures a model, and keeps a copy of its weights if none were nearer."""
        found = self._teaching.divergence(model)
        if found < self.divergence:
            self.divergence, self.where = found, where
            self._state = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}

    def on_the_way(self, model: nn.Module) -> Callable[[float], None]:
        """Looks at a model whenever another quarter of its teaching is over."""
        ahead = list(QUARTERS)

        def look(share: float) -> None:
            if ahead and share >= ahead[0]:
                self.look(model, f"what it was after {ahead[0]:g} of the teaching is kept")
                ahead[:] = [one for one in ahead if one > share]

        return look

    @torch.no_grad()
    def look_back(self, model: nn.Module) -> None:
        """Looks at a model at the end of its way, and along the straight line back; the model is changed."""
        self.look(model, "the end is kept")
        begin = dict(self._start.model.named_parameters())
        end = {name: tensor.clone() for name, tensor in model.named_parameters()}
        for share in QUARTERS:
            for name, tensor in model.named_parameters():
                tensor.copy_(begin[name].lerp(end[name], share))
            self.look(model, f"{share:g} of the straight way is kept")

    @torch.no_grad()
    def give(self, model: nn.Module) -> None:
        """Gives a model the weights that were kept."""
        state = dict(self._start.model.named_parameters()) if self._state is None else self._state
        for name, tensor in model.named_parameters():
            tensor.copy_(state[name])


def _summary(winner: Entrant, kept: _Nearest, others: Sequence[Start], *, finite: bool) -> str:
    line = (
        f"taught from {winner.start.name}, learning rate {winner.lr:g}: {kept.where}; held-out divergence from the "
        f"parents' mean {winner.start.divergence:.4f} before, {kept.divergence:.4f} after"
    )
    line += "".join(f" ({other.name}: {other.divergence:.4f} before)" for other in others)
    return line if finite else f"{line}; it diverged, so lower refine.lr"
