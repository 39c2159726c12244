"""A calibration set and the hidden states of networks over it, kept where a sweep stands."""

import copy
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusionpl.calibration.batches import OfEachParent, batches
from fusionpl.calibration.config import CalibrationConfig
from fusionpl.calibration.kept import Kept, Store
from fusionpl.calibration.sectioned import Call, SectionedModel, Seen
from fusionpl.calibration.taps import Place, place_of, units_of
from fusionpl.families.apply import State
from fusionpl.families.axes import Binding, boundary
from fusionpl.families.family import STEM, TAIL


class CalibrationSet:
    """This rank's calibration batches, which are iterated once and kept.

    Args:
        calibration: any iterable of batches, or one for each parent.
        config: samples and batch size.
        kept: where the batches are kept, and all that is made of them.
        whole: this rank alone is at work, and takes the batches of all.

    Attributes:
        firsts: the number of each batch's first sample.
        owners: the index of the parent whose data each batch is; None where nobody said.
        grid: whether samples are images, cut into a grid of patches.
        targets: what a network shows of what a refit fits to: see `Target`.
        outputs: (module without its block, batch) -> what it puts out in the fused network.
        predicting: batch -> what a head reads in the fused network.

    Raises:
        FusionError: the iterable is empty.
    """

    def __init__(
        self, calibration: Iterable[Any] | OfEachParent, config: CalibrationConfig, kept: Kept, *, whole: bool = False
    ) -> None:
        self.kept = kept
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.grid = False
        self.firsts: list[int] = []
        self.owners: list[int | None] = []
        self.targets = Store[Hashable, Tensor](kept, "targets")
        self.outputs = Store[tuple[str, int], Tensor](kept, "outputs")
        self.predicting = Store[int, Tensor](kept, "predicting")
        self._batches = Store[int, dict[str, Tensor]](kept, "batches")
        self._masks: list[dict[str, Tensor]] = []
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() and not whole else (0, 1)
        self._sizes: list[tuple[int, int | None, int]] = []  # first sample, owner, samples of the batches of all ranks
        for first, batch, owner, turn in batches(calibration, config):
            self._sizes.append((first, owner, len(next(iter(batch.values())))))
            if turn % world != rank:
                continue
            self.grid = "pixel_values" in batch and "input_ids" not in batch
            self._masks.append({key: value.bool().clone() for key, value in batch.items() if key.endswith("mask")})
            # Whoever made the batch may write the next one into the same memory.
            self._batches[len(self.firsts)] = {key: value.clone() for key, value in batch.items()}
            self.firsts.append(first)
            self.owners.append(owner)
        self._weights = _weights_of(self._sizes)
        self._alone = whole

    def head(self, samples: int) -> "CalibrationSet":
        """The batches that begin within the first samples of all ranks, and of each parent's data at least the first;
        what is kept of them is kept here."""
        begins = {owner: first for first, owner, _ in reversed(self._sizes)}
        until = max(samples, 1 + max(begins.values()))
        subset = copy.copy(self)
        subset.firsts = [first for first in self.firsts if first < until]
        subset._sizes = [size for size in self._sizes if size[0] < until]
        subset._weights = _weights_of(subset._sizes)
        return subset

    @property
    def samples(self) -> int:
        """How many there are, on all ranks together."""
        return sum(size for *_, size in self._sizes)

    @property
    def owned(self) -> bool:
        """Whether the data say whose they are."""
        return None not in self._weights

    def sum_over_ranks(self, tensors: Sequence[Tensor]) -> None:
        """Adds up, in place, what each rank made of its batches."""
        if not self._alone:
            sum_over_ranks([*tensors])

    def weight(self, batch: int) -> float:
        """How much each sample of a batch counts: all parents' data together count alike, the mean is 1."""
        return self._weights[self.owners[batch]]

    def __len__(self) -> int:
        return len(self.firsts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The model inputs of a batch."""
        return self._batches[index]

    def mask(self, batch: int, binding: Binding, axis: str) -> Tensor | None:
        """True for real tokens among those that an axis is computed for, [B, T]; None where all are."""
        return self._masks[batch].get(binding.family.stacks[binding.runs_over[axis]].mask)

    def meant(self, tokens: str) -> str:
        """The tokens that `calibration.tokens` asks for: a window is all of them where there is no grid."""
        return "all" if tokens.startswith("window:") and not self.grid else tokens

    def as_kept(self, tensor: Tensor) -> Tensor:
        """Activations in the type that was asked for; float64 stays what it is where that is float32."""
        return tensor.to(
            self.dtype if self.dtype != torch.float32 else torch.promote_types(tensor.dtype, torch.float32)
        )

    def __iter__(self) -> Iterator[int]:
        """The numbers of this rank's batches."""
        return iter(range(len(self)))


def _weights_of(sizes: Iterable[tuple[int, int | None, int]]) -> dict[int | None, float]:
    counts: Counter[int | None] = Counter()
    for _, owner, size in sizes:
        counts[owner] += size
    return {owner: counts.total() / len(counts) / count for owner, count in counts.items()}


@dataclass(frozen=True)
class Passage:
    """What one batch showed on its way through one section.

    Attributes:
        binding, section: of the network, and where.
        seen: what passed at the places that were asked for.
        entry: the stream before the section, or of several blocks that are one before the block in which the places
            are, [B, T, n]; None in the stem.
        out: the stream behind it; None in the tail and where the way ended inside.
    """

    binding: Binding
    section: str
    seen: Seen
    entry: Tensor | None
    out: Tensor | None

    def units(self, axis: str) -> Tensor:
        """The activations of an axis that the section touches."""
        if axis == boundary(self.section):
            assert self.out is not None
            return self.out
        if self.binding.on_boundary(axis):
            assert self.entry is not None
            return self.entry
        if axis not in self.binding.taps:  # between two branches that read one stream
            return torch.stack([self.units(member) for member in self.binding.joins[axis].members]).sum(0)
        return units_of(self.seen, self.binding.taps[axis])


def places_of(binding: Binding, axes: Iterable[str]) -> set[Place]:
    """Where activations of axes are seen inside a section; those on its boundary need no looking."""
    wanted: set[Place] = set()
    for axis in axes:
        if axis not in binding.taps and not binding.on_boundary(axis):
            wanted |= places_of(binding, binding.joins[axis].members)
        elif not binding.on_boundary(axis):
            wanted.add(place_of(binding.taps[axis]))
    return wanted


class Cursor:
    """The hidden states of a network over a calibration set, kept at the boundary that it has reached.

    Args:
        network: the network; one that stands for a network of another depth is read, and that one is run: see `Cut`.
        data: the calibration set.
        name: tells its hidden states from those of other networks.
    """

    def __init__(self, network: SectionedModel, data: CalibrationSet, name: str) -> None:
        self.network, self.data = network, data
        self._original = network.original
        self._hidden = Store[tuple[int, int], Tensor](data.kept, (name, "hidden"))  # (stack, batch)
        self._calls = Store[int, dict[str, Call]](data.kept, (name, "calls"))  # batch -> block -> call
        self._carried = Store[int, dict[str, Any]](data.kept, (name, "carried"))

    def states(self, section: str, own: State) -> State:
        """The parameters that a step through a section takes, of which `own` are the section's."""
        cut = self.network.cut
        return self.network.states(section, own) if cut is None or section not in cut.runs else cut.states(section, own)

    def step(
        self,
        section: str,
        state: State,
        index: int,
        places: Iterable[Place] = (),
        *,
        stop: bool = False,
        given: Mapping[str, Tensor] | None = None,
    ) -> Passage:
        """Takes one batch through a section, which stands before it.

        Args:
            section: the next section.
            state: the parameters that it takes: see `states`.
            index: the batch.
            places: where to look on the way.
            stop: go no further than the last of `places`; the batch then still stands before the section.
            given: what modules of a block put out, who are not run then.
        """
        binding = self.network.binding
        stack = binding.ends.index(section) - 1 if section in binding.ends else binding.stack_of[section]
        entry = self._hidden[stack, index] if section != STEM else None
        out: Tensor | None = None
        if section in binding.blocks:
            assert entry is not None
            calls, cut = self._calls[index], self.network.cut
            if cut is None or section in cut.missing:  # what computes nothing is called like any other
                args, keywords = calls[section] if cut is None else next(iter(calls.values()))
                call = args, keywords | self._carried[index]
                passed = self.network.through(section, state, entry, call, places, stop=stop, given=given)
            else:
                passed = cut.through(section, state, entry, calls, places)
            out, carried, seen, entry = passed
            if out is not None and not stop:
                self._arrive(stack, index, out, carried)
        elif section == TAIL:
            _, seen = self._original.leave(state, self.data[index], self._ends(index, stack), places, stop=stop)
        else:
            out, listed, seen = self._original.enter(state, self.data[index], self._ends(index, stack), places)
            self._calls[index] = dict(zip(self._original.binding.stacks[stack + 1], listed, strict=True))
            if not stop:
                self._arrive(stack + 1, index, out, {})
        return Passage(binding, section, seen, entry, out)

    def _arrive(self, stack: int, index: int, out: Tensor, carried: dict[str, Any]) -> None:
        self._hidden[stack, index] = self.data.as_kept(out)
        self._carried[index] = carried

    def _ends(self, index: int, last: int) -> list[Tensor]:
        """The hidden states behind the stacks up to one."""
        return [self._hidden[stack, index] for stack in range(last + 1)]

    def logits(self, state: State, index: int) -> Tensor:
        """What the network puts out for a batch, which stands before the tail.

        Args:
            state: the parameters that the tail takes.
            index: the batch.
        """
        ends = self._ends(index, len(self.network.binding.stacks) - 1)
        logits, _ = self._original.leave(state, self.data[index], ends)
        assert logits is not None
        return logits


def sum_over_ranks(tensors: list[Tensor]) -> None:
    """Adds up tensors of one type over all ranks, in place and in one all-reduce."""
    if not dist.is_initialized() or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


def or_zeros(tensor: Tensor | None) -> Tensor:
    """What is to be summed over ranks: on a rank that saw no batch, and has none, zeros as large as another's."""
    if not dist.is_initialized():
        assert tensor is not None  # a calibration set has samples
        return tensor
    shapes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shapes, None if tensor is None else tensor.shape)
    shape = next(shape for shape in shapes if shape is not None)
    return torch.zeros(shape, dtype=torch.float64) if tensor is None else tensor
