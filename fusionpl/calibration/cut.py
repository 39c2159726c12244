"""A network that is cut into other blocks than its own: several of them are one, or none is."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fusionpl.calibration.sectioned import Call, Passed, SectionedModel, Seen
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


@dataclass(frozen=True)
class Cut:
    """What is run where a network stands in the blocks of another depth.

    Blocks that are taken together run one after the other: the stream behind them is the network's own. What is seen
    inside, and what is read as the parameters, is of one of them. Where a block stands for none, the stream stays.

    Attributes:
        source: the network in its own blocks.
        runs: block of the other depth -> the network's blocks that stand for it.
    """

    source: SectionedModel
    runs: Mapping[str, Run]

    @property
    def missing(self) -> frozenset[str]:
        """The blocks that compute nothing."""
        return frozenset(block for block, run in self.runs.items() if run.kept is None)

    def states(self, section: str, own: State) -> State:
        """The parameters that it takes to run the blocks that stand for one, by their own names.

        Args:
            section: the block of the other depth.
            own: what is read as its parameters.
        """
        run = self.runs[section]
        if run.kept is None:
            return own
        state, binding = _renamed(own, section, run.kept), self.source.binding
        if len(run.blocks) > 1:
            norm = binding.end_norm(run.kept) if binding.family.norm == "post" else None
            ends = {name: tensor for name, tensor in state.items() if norm and name.startswith(f"{norm}.")}
            for block in run.blocks:
                if block != run.kept or norm:  # the one that is kept was read with another's norm
                    state |= self.source.parameters(block)
            state |= _renamed(ends, run.kept, run.blocks[-1])
        return state

    def through(
        self, section: str, state: State, hidden: Tensor, calls: Mapping[str, Call], places: Iterable[Place]
    ) -> Passed:
        """Runs all blocks that stand for one, to the end of the last.

        Args:
            section: the block of the other depth, which is not `missing`.
            state: see `states`.
            hidden: the hidden states before it.
            calls: what else each block of `source` is called with.
            places: where to look on the way, in the block of the other depth.
        """
        run = self.runs[section]
        assert run.kept is not None
        there = {Place(_moved(place.module, section, run.kept), place.side): place for place in places}
        out, seen, entry = hidden, Seen(), hidden
        for block in run.blocks:
            held = {name: state[name] for name in self.source.binding.uses[block]}
            passed = self.source.through(block, held, out, calls[block], there if block == run.kept else ())
            if block == run.kept:
                entry, seen = out, {there[place]: tensor for place, tensor in passed.seen.items()}
            assert passed.out is not None
            out = passed.out
        return Passed(out, {}, seen, entry)


def cut_into(source: SectionedModel, module: nn.Module, binding: Binding, runs: Mapping[str, Run]) -> SectionedModel:
    """A network in the blocks of one of another depth. Alone it is what is read as its parameters; a `Cursor` runs the
    network itself: see `Cut`.

    The parameters of a block that stands for none are those of one that adds nothing. In post-LN networks a norm ends
    each block. That of blocks that are taken together is the last one's. What stands before a block that adds nothing
    ends with a norm that neither scales nor shifts, and that block scales and shifts in its place: normalising twice is
    normalising once.

    Args:
        source: the network.
        module: a model of the other depth, of the same widths, whose parameters may be on the meta device.
        binding: its binding.
        runs: block of the other depth -> the network's blocks that stand for it.

    Raises:
        FusionError: a block that adds nothing stands where no norm of a post-LN network ends what is before it.
    """
    names: dict[str, str | None] = {}
    for name, section in binding.owners.items():
        run = runs.get(section)
        names[name] = name if run is None else run.kept and _moved(name, section, run.kept)
    names |= _ends(source, binding, runs) if binding.family.norm == "post" else {}
    ones = {
        slot.parameter
        for slot in binding.slots
        if slot.gain or (len(slot.axes) == 1 and slot.parameter.endswith(".weight"))
    }

    def read(name: str) -> Tensor:
        if (own := names[name]) is not None:
            return source.read(own)
        like = module.get_parameter(name)
        return torch.full(like.shape, float(name in ones), dtype=like.dtype)

    return source.but(module=module, binding=binding, read=read, cut=Cut(source, runs))


def _ends(source: SectionedModel, binding: Binding, runs: Mapping[str, Run]) -> dict[str, str | None]:
    """The parameters of the norms that end sections -> the network's that stand for them; None where none does."""
    names: dict[str, str | None] = {}
    last = ""  # the network's norm behind which the stream is
    for section, after in pairwise(binding.sections):
        norm, blocks = binding.end_norm(section), runs[section].blocks if section in runs else (section,)
        silent = after in runs and runs[after].kept is None
        if norm is not None:
            last = _moved(norm, section, blocks[-1]) if blocks else last
            names |= {f"{norm}.{leaf}": None if silent else f"{last}.{leaf}" for leaf in ("weight", "bias")}
        elif silent:
            raise FusionError(
                f"{source.name}: no norm ends what stands before its first block, so that a block that adds "
                "nothing can't stand there; use parents of one depth"
            )
    return names


def _moved(name: str, source: str, target: str) -> str:
    return target + name.removeprefix(source) if name.startswith(f"{source}.") else name


def _renamed(state: State, source: str, target: str) -> State:
    return {_moved(name, source, target): tensor for name, tensor in state.items()}
