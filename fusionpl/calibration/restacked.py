"""A network that is cut into other blocks than its own: several of them as one, or none."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fusionpl.calibration.forward import Batch
from fusionpl.calibration.sectioned import Call, Passed, Prepare, SectionedModel, Seen
from fusionpl.calibration.taps import Place
from fusionpl.errors import FusionError
from fusionpl.families.apply import State
from fusionpl.families.axes import Binding


@dataclass(frozen=True)
class Run:
    """Blocks of a network that stand for one block of another depth.

    Attributes:
        blocks: their sections, in forward order; none computes nothing.
        kept: the one whose parameters and units stand for all; None where there is none.
    """

    blocks: tuple[str, ...]
    kept: str | None


class Restacked(SectionedModel):
    """A network in the sections of one of another depth.

    Blocks that are taken together run one after the other: the stream behind them is the network's own. What is seen
    inside, and what is read as the parameters, is of one of them. Where a block stands for none, the stream stays, and
    its parameters are those of a block that adds nothing.

    In post-LN networks a norm ends each block. That of blocks that are taken together is the last one's. What stands
    before a block that adds nothing ends with a norm that neither scales nor shifts, and that block scales and shifts
    in its place: normalising twice is normalising once.

    Args:
        source: the network.
        module: a model of the other depth, of the same widths, whose parameters may be on the meta device.
        binding: its binding.
        runs: block of the other depth -> the network's blocks that stand for it.
    """

    def __init__(self, source: SectionedModel, module: nn.Module, binding: Binding, runs: Mapping[str, Run]) -> None:
        super().__init__(
            module, binding, source.name, read=source.read, device=source.device, float32=source.float32,
            prepare=source.prepare, missing_tokens=source.missing_tokens,
        )  # fmt: skip
        self._source, self._runs = source, runs
        self._elementwise = {
            slot.parameter
            for slot in binding.slots
            if slot.gain or (len(slot.axes) == 1 and slot.parameter.endswith(".weight"))
        }
        self._before = {after: before for before, after in pairwise(binding.sections)}
        self._after = dict(pairwise(binding.sections))
        self._ends: dict[str, str] = {}  # section -> the norm that ends it
        if binding.family.norm == "post":
            ends = {section: binding.end_norm(section) for section in binding.sections[:-1]}
            self._ends = {section: norm for section, norm in ends.items() if norm is not None}
            for block in self.missing_blocks:
                if self._before[block] not in self._ends:
                    raise FusionError(
                        f"{self.name}: no norm ends what stands before its first block, so that a block that adds "
                        "nothing can't stand there; use parents of one depth"
                    )

    @property
    def original(self) -> SectionedModel:
        """The network as it was trained."""
        return self._source

    @property
    def missing_blocks(self) -> frozenset[str]:
        """The blocks that compute nothing."""
        return frozenset(block for block, run in self._runs.items() if run.kept is None)

    def prepared(self, prepare: Prepare | None) -> SectionedModel:
        """The same network with its parameters prepared in another way."""
        return Restacked(self._source.prepared(prepare), self.module, self.binding, self._runs)

    def parameters(self, section: str) -> State:
        """The parameters of the block that stands for a section; of one that adds nothing, where there is none."""
        run = self._runs.get(section)
        if run is None:
            state = self._source.parameters(section)
        elif run.kept is None:
            state = {name: self._blank(name) for name in self.binding.uses[section]}
        else:
            state = _renamed(self._source.parameters(run.kept), run.kept, section)
        return state | self._end(section)

    def beneath(self, section: str) -> State:
        """Parameters needed beside those of a section; for blocks that are taken together, also those of the others."""
        run = self._runs.get(section)
        if run is None:
            return self._source.beneath(section)
        state: State = {}
        for block in run.blocks if len(run.blocks) > 1 else ():
            if block != run.kept or self._ends:  # the one that is kept has another's norm
                state |= self._source.parameters(block)
        if state:
            state |= _renamed(self._end(section), section, run.blocks[-1])
        return {_ASIDE + name: tensor for name, tensor in state.items()}

    def _end(self, section: str) -> State:
        """The parameters of the norm that ends a section of a post-LN network."""
        if section not in self._ends:
            return {}
        names = [f"{self._ends[section]}.{leaf}" for leaf in ("weight", "bias")]
        if self._after[section] in self.missing_blocks:
            return {name: self._blank(name) for name in names}
        last = section
        while last in self.missing_blocks:
            last = self._before[last]
        block = self._runs[last].blocks[-1] if last in self._runs else last
        held = self._source.parameters(block)
        there = self._ends[last]
        return {
            name: held[_moved(f"{there}.{leaf}", last, block)]
            for name, leaf in zip(names, ("weight", "bias"), strict=True)
        }

    def enter(
        self, state: State, batch: Batch, ends: Sequence[Tensor] = (), places: Iterable[Place] = ()
    ) -> tuple[Tensor, list[Call], Seen]:
        """Runs what stands before a stack; the calls are of the other depth, and hold those of its own blocks."""
        stack = len(ends)
        hidden, calls, seen = self._source.enter(state, batch, ends, places)
        own = dict(zip(self._source.binding.stacks[stack], calls, strict=True))
        block_calls: list[Call] = []
        for block in self.binding.stacks[stack]:
            run = self._runs[block]
            args, keywords = own[run.kept] if run.kept else calls[0]  # what computes nothing is called like any other
            block_calls.append((args, {**keywords, _CALLS: {name: own[name] for name in run.blocks}}))
        return hidden, block_calls, seen

    def through(
        self,
        section: str,
        state: State,
        hidden: Tensor,
        call: Call,
        places: Iterable[Place] = (),
        *,
        stop: bool = False,
        given: Mapping[str, Tensor] | None = None,
    ) -> Passed:
        """Runs all blocks that stand for one, to the end of the last."""
        run = self._runs[section]
        args, keywords = call
        calls: Mapping[str, Call] = keywords[_CALLS]
        keywords = {key: value for key, value in keywords.items() if key != _CALLS}
        if run.kept is None:
            return super().through(section, state, hidden, (args, keywords), places)
        own = _renamed(
            {name: tensor for name, tensor in state.items() if not name.startswith(_ASIDE)}, section, run.kept
        )
        own |= {name.removeprefix(_ASIDE): tensor for name, tensor in state.items() if name.startswith(_ASIDE)}
        there = {Place(_moved(place.module, section, run.kept), place.side): place for place in places}
        out, seen, entry = hidden, Seen(), hidden
        for block in run.blocks:
            looked_at = there if block == run.kept else ()
            held = {name: own[name] for name in self._source.binding.uses[block]}
            passed = self._source.through(block, held, out, calls[block], looked_at)
            if block == run.kept:
                entry, seen = out, {there[place]: tensor for place, tensor in passed.seen.items()}
            assert passed.out is not None
            out = passed.out
        return Passed(out, {}, seen, entry)

    def leave(
        self, state: State, batch: Batch, ends: Sequence[Tensor], places: Iterable[Place] = (), *, stop: bool = False
    ) -> tuple[Tensor | None, Seen]:
        """Runs the tail; see `SectionedModel.leave`."""
        return self._source.leave(state, batch, ends, places, stop=stop)

    def _blank(self, name: str) -> Tensor:
        like = self.module.get_parameter(name)
        kind = torch.promote_types(like.dtype, torch.float32) if self.float32 else like.dtype
        return torch.full(like.shape, float(name in self._elementwise), dtype=kind, device=self.device)


_CALLS = "calls of the blocks that are one"
_ASIDE = "beside: "


def _moved(name: str, source: str, target: str) -> str:
    return target + name.removeprefix(source) if name.startswith(f"{source}.") else name


def _renamed(state: State, source: str, target: str) -> State:
    return {_moved(name, source, target): tensor for name, tensor in state.items()}
