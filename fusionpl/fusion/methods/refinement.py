"""Learned refinement: a model is taught its parents' mean on unlabelled data, as far as held-out samples say it helps.

What is minimised is the cross-entropy of its probabilities q to the parents' weighted mean, over samples x that are not
held out, with AdamW, a warm-up and a cosine:

    p(. | x) = sum over k of w_k p_k(. | x),        L = - mean over x of sum over c of p(c | x) log q(c | x)

(on the data of one parent p is its own; of tags the mean of each one's own; of numbers the mean squared error to the
mean). The judge is D = L less the entropy of p, the mean Kullback-Leibler divergence of q from p, on the held-out fifth
of the samples.

Each start has its share of the time. A race chooses its learning rate: it is taught with each for a little while, with
the half that has the lower D twice as long, and so on until one is left. With that it is taught to the end, from its
weights s to e. What is kept has the lowest D of all that was looked at: for each start s, the weights after each
quarter of the teaching, e, and s + t (e - s) with t = 1/4, 1/2 and 3/4. So D never rises. Starts don't race each other:
what is nearer at first learns more slowly, and is overtaken.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (arXiv 1503.02531), at temperature 1. The
race halves as that of Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization",
AISTATS 2016; the straight way is that of Wortsman et al., "Robust Fine-Tuning of Zero-Shot Models", CVPR 2022.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusionpl.calibration.batches import OfEachParent, Progress, no_progress
from fusionpl.calibration.cursor import CalibrationSet
from fusionpl.calibration.forward import device_of
from fusionpl.errors import FusionError
from fusionpl.families.axes import Binding
from fusionpl.families.binding import bind
from fusionpl.families.family import Family
from fusionpl.fusion.config import RACE, FuseConfig, RefineConfig
from fusionpl.fusion.heads import best_head, can_fit_heads
from fusionpl.fusion.parents import AlignedParent
from fusionpl.fusion.teaching import Augment, Teaching
from fusionpl.fusion.unlabelled import Unlabelled
from fusionpl.fusion.voting import Voting
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
        steps: that were taken, those of the race among them.
    """

    model: nn.Module
    parent: int | None
    summary: str
    steps: int


@dataclass(frozen=True)
class Start:
    """What may be taught, and its divergence from the parents' mean on held-out samples."""

    name: str
    model: nn.Module
    parent: int | None
    divergence: float


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
    votings: Sequence[Voting],
    *,
    more: Iterable[Any] | OfEachParent | None = None,
    augment: Augment | None = None,
    seed: int = 0,
    apart: bool = False,
    progress: Progress = no_progress,
) -> Taught:
    """Teaches what parents were fused to, or the best of them, what they predict together.

    Under torch.distributed all ranks choose the same, and the first rank's clock counts; see `Teaching`.

    Args:
        model: the fused one; it stays as it is.
        binding: the model's.
        parents: the teachers.
        data: this rank's calibration batches.
        config: its `refine` says how.
        votings: who says what the model is to predict.
        more: what is taught on besides the calibration set; see `Unlabelled`.
        augment: see `Teaching`; used where `refine.augment` asks for it.
        seed: see `Teaching`.
        apart: whether the parents know other classes. A parent with its head fitted is then nearer to their mean, which
            is half and half, and right less often than the fused model: `auto` starts from that one.
        progress: wraps the steps.

    Raises:
        FusionError: see `Unlabelled`.
    """
    asked, begun = config.refine, time.monotonic()
    teachers = [parent.network.original.whole() for parent in parents]
    teaching = _teaching(teachers, votings, binding.family, data, asked, more, augment, seed)
    starts = []
    if asked.start != "parent":
        starts.append(Start("the fused model", model, None, teaching.divergence(model)))
    alone = asked.start == "fused" or (asked.start == "auto" and apart)
    if not alone and (parent := _best_parent(parents, votings, data, config, teaching)) is not None:
        starts.append(parent)
    return _taught(starts, teaching, asked, begun, progress)


def teach_parent(
    index: int,
    parents: Sequence[nn.Module],
    votings: Sequence[Voting],
    data: CalibrationSet,
    config: RefineConfig,
    *,
    family: Family | None = None,
    more: Iterable[Any] | OfEachParent | None = None,
    augment: Augment | None = None,
    seed: int = 0,
) -> Taught:
    """Teaches one parent, in float32, as `refine` does: from its head fitted, where it has one that can be.

    Args:
        index: which.
        parents: the teachers; they stay as they are.
        votings: who says what it is to predict.
        data: calibration batches.
        config: how long, in which steps and on what.
        family: the parents', where the library does not say.
        more, augment, seed: see `refine`.

    Raises:
        FusionError: see `Unlabelled`.
    """
    begun, family = time.monotonic(), bind(parents[index], family).family
    teaching = _teaching(parents, votings, family, data, config, more, augment, seed)
    fits = can_fit_heads(parents, family)
    student = _with_head(parents, votings, data, family, [index])[1] if fits else copy.deepcopy(parents[index])
    model = student.float().eval()
    start = Start(f"the parent{' with its head fitted' if fits else ''}", model, index, teaching.divergence(model))
    return _taught([start], teaching, config, begun, no_progress)


def _teaching(
    teachers: Sequence[nn.Module],
    votings: Sequence[Voting],
    family: Family,
    data: CalibrationSet,
    asked: RefineConfig,
    more: Iterable[Any] | OfEachParent | None,
    augment: Augment | None,
    seed: int,
) -> Teaching:
    samples = Unlabelled(data, more, asked.samples, device_of(teachers[0]))
    augment = augment if asked.augment else None
    return Teaching(teachers, votings, family.stacks[-1].mask, samples, asked.batch_size, augment, seed)


def _best_parent(
    parents: Sequence[AlignedParent],
    votings: Sequence[Voting],
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
    best, model = _with_head(plain, votings, data, family, whole)
    return Start(f"{parents[best].network.name} with its head fitted", model, best, teaching.divergence(model))


def _with_head(
    models: Sequence[nn.Module], votings: Sequence[Voting], data: CalibrationSet, family: Family, among: Sequence[int]
) -> tuple[int, nn.Module]:
    """The index of the one `among` models that predicts best once its head is fitted, and that model."""
    best, model, _ = best_head(models, votings, data, family=family, among=among)
    return best, copy.deepcopy(model).eval()  # it shares its parameters with the parent


def _taught(
    starts: Sequence[Start], teaching: Teaching, config: RefineConfig, begun: float, progress: Progress
) -> Taught:
    """The nearest of all that is looked at while each start is taught for its share of the time."""
    best, found, end = starts[0], "", ""
    model, nearest = starts[0].model, math.inf
    for place, start in enumerate(starts):
        course = _Course(config, teaching.device, begun, place, len(starts))
        lr = _race(start, RATES if config.lr is None else (config.lr,), teaching, course, progress)
        kept, student = _Nearest(start, teaching), copy.deepcopy(start.model)
        finite = teaching.run(student, lr, progress(course.rest(teaching), "refine"), kept.on_the_way(student))
        kept.look_back(student)
        kept.give(student)
        if not kept.divergence >= nearest:
            best, model, nearest = start, student, kept.divergence
            found, end = f"learning rate {lr:g}: {kept.where}", "" if finite else "; it diverged, so lower refine.lr"
    summary = (
        f"taught from {best.name}, {found}; held-out divergence from the parents' mean {best.divergence:.4f} before, "
        f"{nearest:.4f} after"
    )
    summary += "".join(f" ({other.name}: {other.divergence:.4f} before)" for other in starts if other is not best)
    return Taught(model, best.parent, summary + end, teaching.steps)


def _race(start: Start, rates: Sequence[float], teaching: Teaching, course: "_Course", progress: Progress) -> float:
    """The learning rate: with each the start is taught for a little while, with the better half twice as long, and so
    on; each time from its own weights."""
    rounds = (len(rates) - 1).bit_length()
    for number in range(rounds):
        part, reached = 1 / rounds / len(rates), []
        for place, lr in enumerate(progress(rates, "race")):
            model, until = copy.deepcopy(start.model), number / rounds + (place + 1) * part
            teaching.run(model, lr, course.heat(part, until, teaching))
            divergence = teaching.divergence(model)
            # What makes a start worse, or no number, leaves it as it is.
            reached.append(divergence if divergence < start.divergence else start.divergence)
        order = sorted(range(len(rates)), key=reached.__getitem__)
        rates = [rates[at] for at in order[: (len(rates) + 1) // 2]]
    return rates[0]


class _Course:
    """How long one start is taught, in steps or by the first rank's clock.

    Args:
        config: how long all are.
        device: where ranks exchange what the clock shows.
        begun: when the refinement began.
        place: of the start.
        count: of starts, each of which has as much.
    """

    def __init__(
        self, config: RefineConfig, device: torch.device, begun: float, place: int = 0, count: int = 1
    ) -> None:
        self._device, self._steps = device, max(1, round(config.planned / count))
        self._end = None if config.minutes is None else begun + 60 * config.minutes * (place + 1) / count
        self._race: float | None = None  # when it began

    def heat(self, part: float, until: float, teaching: Teaching) -> Iterable[float]:
        """The steps of one entrant; before each the share of them that is over.

        Args:
            part: of the race.
            until: the share of the race that is over then.
            teaching: knows how long it takes to look at the result, which counts.
        """
        if self._end is None:
            return _by_steps(max(1, round(RACE * part * self._steps)))
        now = time.monotonic()
        self._race = now if self._race is None else self._race
        end = self._race + RACE * until * (self._end - self._race)
        return _by_clock(end - now - teaching.seconds, self._device)

    def rest(self, teaching: Teaching) -> Iterable[float]:
        """The steps of the teaching itself."""
        if self._end is None:
            return _by_steps(self._steps)
        left = self._end - time.monotonic()
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
        self._teaching, self.divergence, self.where = teaching, start.divergence, "the start is kept"
        self._begin = self._state = dict[str, Tensor](start.model.named_parameters())

    def look(self, model: nn.Module, where: str) -> None:
        """Measures a model, and keeps a copy of its weights if none were nearer."""
        divergence = self._teaching.divergence(model)
        if divergence < self.divergence:
            self.divergence, self.where = divergence, where
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
        end = {name: tensor.clone() for name, tensor in model.named_parameters()}
        for share in QUARTERS:
            for name, tensor in model.named_parameters():
                tensor.copy_(self._begin[name].lerp(end[name], share))
            self.look(model, f"{share:g} of the straight way is kept")

    @torch.no_grad()
    def give(self, model: nn.Module) -> None:
        """Gives a model the weights that were kept."""
        for name, tensor in model.named_parameters():
            tensor.copy_(self._state[name])
