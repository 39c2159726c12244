"""A model that is read and run one section at a time: the stem, each block, the tail."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fusionpl.calibration.forward import Batch, arguments, device_of, scores
from fusionpl.calibration.taps import Place, Reached, captured
from fusionpl.families.apply import State, in_float32, with_parameters
from fusionpl.families.axes import Binding
from fusionpl.families.binding import bind
from fusionpl.families.compatible import check_finite
from fusionpl.families.family import TAIL

if TYPE_CHECKING:
    from fusionpl.calibration.cut import Cut

_HIDDEN = "hidden_states"  # by which transformers name them
Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block is called with behind the hidden states
Seen = dict[Place, Tensor]
Step = Callable[[tuple[Any, ...], dict[str, Any]], Any]
Prepare = Callable[[Mapping[str, Tensor], Binding, str, str], State]


class Passed(NamedTuple):
    """What a batch left behind on its way through a block.

    Attributes:
        out: the hidden states behind it; None where the way ended inside.
        carried: what the next block is called with because of it.
        seen: what passed at the places that were asked for.
        entry: the hidden states before the block in which these places are.
    """

    out: Tensor | None
    carried: dict[str, Any]
    seen: Seen
    entry: Tensor


class SectionedModel:
    """A bound model, read and run section by section.

    Its modules only say how to compute: parameters are handed to them for each call, so nothing in the model changes,
    and they may be on the meta device and lie in files.

    Args:
        module: the model.
        binding: its binding.
        name: how messages call it.
        read: gives a parameter by its name, in its own type; by default the module's own.
        device: where the parameters are moved; by default they stay where they are.
        float32: compute in float32 where parameters are kept in half precision, which the CPU always does: products
            of half precision are many times slower there.
        prepare: what is done to the parameters of a section when they are read: `canonical`, `without_scales`.
        missing_tokens: rows of the vocabulary that the model has not, and that hold something else in its place.
        cut: what a `Cursor` runs in its place, where it stands for a network of another depth.
    """

    def __init__(
        self,
        module: nn.Module,
        binding: Binding,
        name: str = "the model",
        *,
        read: Callable[[str], Tensor] | None = None,
        device: torch.device | None = None,
        float32: bool = False,
        prepare: Prepare | None = None,
        missing_tokens: Tensor | None = None,
        cut: "Cut | None" = None,
    ) -> None:
        self.module, self.binding, self.name = module, binding, name
        self.read = read or (lambda parameter: module.get_parameter(parameter).detach())
        self.device = device or device_of(module)
        self.float32 = float32 or self.device.type == "cpu"
        self.prepare = prepare
        self.missing_tokens = missing_tokens
        self.cut = cut
        self._stacks = [[module.get_submodule(path) for path in stack] for stack in binding.stacks]

    @property
    def original(self) -> "SectionedModel":
        """The network that a `Cursor` runs: in its own blocks."""
        return self if self.cut is None else self.cut.source

    def but(self, **changes: Any) -> "SectionedModel":
        """The same network with some of its arguments changed."""
        names = ("module", "binding", "name", "read", "device", "float32", "prepare", "missing_tokens", "cut")
        return SectionedModel(**{**{name: getattr(self, name) for name in names}, **changes})

    def prepared(self, prepare: Prepare | None) -> "SectionedModel":
        """The same model with its parameters prepared in another way."""
        cut = None if self.cut is None else replace(self.cut, source=self.cut.source.prepared(prepare))
        return self.but(prepare=prepare, cut=cut)

    def moved(self, module: nn.Module, move: Callable[[str, Tensor], Tensor]) -> "SectionedModel":
        """A network of another module, whose parameters are computed from this one's as they are read.

        Args:
            module: like this one's, but for some sizes.
            move: (name, parameter) -> the parameter that the module has.
        """
        binding = bind(module, self.binding.family)
        return self.but(module=module, binding=binding, read=lambda name: move(name, self.read(name)))

    def parameters(self, section: str) -> State:
        """The parameters that a section uses, prepared.

        Raises:
            FusionError: one of them holds NaN or infinite values.
        """
        owners: dict[str, list[str]] = {}
        for name in self.binding.uses[section]:
            owners.setdefault(self.binding.owners[name], []).append(name)
        state: State = {}
        for owner, names in owners.items():
            if owner == section:
                own = {name: self.read(name).to(self.device) for name in names}
                check_finite(own, self.name)
                own = in_float32(own) if self.float32 else own
                state |= self.prepare(own, self.binding, section, self.name) if self.prepare else own
            else:  # a tied one
                others = self.parameters(owner)
                state |= {name: others[name] for name in names}
        return state

    def state(self) -> State:
        """All parameters, prepared."""
        state: State = {}
        for section in self.binding.sections:
            state = self.parameters(section) | state
        return state

    def whole(self) -> nn.Module:
        """The model with all its prepared parameters, in eval mode."""
        return with_parameters(self.module, self.state()).eval()

    def enter(
        self, state: State, batch: Batch, ends: Sequence[Tensor] = (), places: Iterable[Place] = ()
    ) -> tuple[Tensor, list[Call], Seen]:
        """Runs what stands before a stack of blocks.

        Args:
            state: the parameters of the stack's stem and of those before it.
            batch: model inputs.
            ends: the hidden states behind each stack before it.
            places: where to look on the way.

        Returns:
            The hidden states that the first block takes, what else each block is called with, and what was seen.
        """
        blocks, returns = self._stacks[len(ends)], self.binding.family.stacks[len(ends)].returns
        hidden: list[Tensor] = []
        calls: list[Call] = []

        def arrive(block: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            states, call = _parted(block, args, keywords, named=bool(returns))
            hidden[:] = hidden or [states]
            calls.append(call)
            if len(calls) == len(blocks):
                raise Reached
            return _returned(states, returns)

        steps = self._passing(state, ends) | {block: partial(arrive, block) for block in blocks}
        with captured(self.module, places) as seen, _replaced(steps), suppress(Reached):
            self._run(state, batch)
        return hidden[0], calls, seen

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
        """Runs one block.

        Args:
            section: its name.
            state: its parameters.
            hidden: the hidden states before it.
            call: what else it is called with.
            places: where to look on the way.
            stop: go no further than the last of `places`.
            given: module -> what it puts out; it is not run.
        """
        out = None
        returns = self.binding.family.stacks[self.binding.stack_of[section]].returns
        carried: dict[str, Any] = {}
        local = {name.removeprefix(f"{section}."): tensor for name, tensor in state.items()}
        hidden = hidden.to(_type_of(state))
        steps = {self.module.get_submodule(module): _giving(output) for module, output in (given or {}).items()}
        with _replaced(steps), captured(self.module, places, stop=stop) as seen:
            out = functional_call(self.module.get_submodule(section), local, (hidden, *call[0]), call[1])
            if isinstance(out, tuple):
                out, *others = out
                carried = dict(zip(returns, others, strict=False))
        return Passed(out, carried, {place: _by_sample(tensor, hidden) for place, tensor in seen.items()}, hidden)

    def leave(
        self, state: State, batch: Batch, ends: Sequence[Tensor], places: Iterable[Place] = (), *, stop: bool = False
    ) -> tuple[Tensor | None, Seen]:
        """Runs the tail.

        Args:
            state: the parameters of the stems and the tail.
            batch: model inputs.
            ends: the hidden states behind each stack.
            places: where to look on the way.
            stop: go no further than the last of `places`.

        Returns:
            The logits (None if stopped), and what was seen.
        """
        logits = None
        with _replaced(self._passing(state, ends)), captured(self.module, places, stop=stop) as seen:
            logits = scores(self._run(state, batch))
        return logits, seen

    def _passing(self, state: State, ends: Sequence[Tensor]) -> dict[nn.Module, Step]:
        """Steps past whole stacks of blocks, whose last ones put out what is known."""
        steps: dict[nn.Module, Step] = {}
        for blocks, stack, end in zip(self._stacks, self.binding.family.stacks, ends, strict=False):
            known = end.to(_type_of(state))

            def skip(args: tuple[Any, ...], keywords: dict[str, Any], returns: tuple[str, ...] = stack.returns) -> Any:
                return _returned(_states(args, keywords), returns)

            steps |= dict.fromkeys(blocks, skip) | {blocks[-1]: _giving(_returned(known, stack.returns))}
        return steps

    def states(self, section: str, own: State | None = None) -> State:
        """All parameters that it takes to run a section: its own, which are read unless they are given, and for a stem
        or the tail those of the stems before it."""
        state: State = {}
        if section in self.binding.ends:
            for stem in self.binding.ends[: self.binding.ends.index(section)]:
                state |= self.parameters(stem)
        return state | (self.parameters(section) if own is None else own)

    @torch.no_grad()
    def walk(self, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        """Runs the whole network on a batch, with one section in memory at a time.

        Yields:
            Each section's name with the hidden states behind it; of the last, the logits.
        """
        ends: list[Tensor] = []
        for stack, blocks in zip(self.binding.family.stacks, self.binding.stacks, strict=True):
            hidden, calls, _ = self.enter(self.states(stack.stem_name), batch, ends)
            yield stack.stem_name, hidden
            carried: dict[str, Any] = {}
            for section, (args, keywords) in zip(blocks, calls, strict=True):
                call = args, keywords | carried
                hidden, carried, *_ = self.through(section, self.states(section), hidden, call)  # type: ignore[assignment]
                yield section, hidden
            ends.append(hidden)
        logits, _ = self.leave(self.states(TAIL), batch, ends)
        assert logits is not None
        yield TAIL, logits

    def logits(self, batch: Batch) -> Tensor:
        """Runs the whole network on a batch, with one section in memory at a time; the logits."""
        *_, (_, logits) = self.walk(batch)
        return logits

    def _run(self, state: State, batch: Batch) -> Any:
        args, keywords = arguments(self.module, batch, next(iter(state.values())))
        return functional_call(self.module, state, args, keywords)


@contextmanager
def _replaced(steps: Mapping[nn.Module, Step]) -> Iterator[None]:
    """Lets a step take the place of what each module computes."""
    with ExitStack() as stack:
        for module, step in steps.items():
            own = module.__dict__.get("forward")  # libraries that dispatch modules put theirs there too
            module.forward = lambda *args, step=step, **keywords: step(args, keywords)
            stack.callback(_give_back, module, own)
        yield


def _giving(output: Any) -> Step:
    def give(args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        flat = args and isinstance(output, Tensor) and isinstance(args[0], Tensor) and args[0].ndim < output.ndim
        return output.flatten(0, 1) if flat else output

    return give


def _by_sample(seen: Tensor, hidden: Tensor) -> Tensor:
    """What a module shows, sample by sample, where its block lays all tokens in a row (OPT's MLP)."""
    flat = seen.ndim == 2 < hidden.ndim and len(seen) == hidden.shape[:2].numel()
    return seen.unflatten(0, hidden.shape[:2]) if flat else seen


def _give_back(module: nn.Module, forward: Any) -> None:
    del module.forward
    if forward is not None:
        module.forward = forward


def _type_of(state: State) -> torch.dtype:
    return next(iter(state.values())).dtype


def _returned(states: Tensor, returns: Sequence[str]) -> Any:
    """What a block that computes nothing puts out."""
    return (states, *[None] * len(returns)) if returns else states


def _parted(block: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], *, named: bool) -> tuple[Tensor, Call]:
    """The hidden states that a block is called with, and the rest; `named` gives all of it by its names."""
    if args and named:
        names = list(inspect.signature(type(block).forward).parameters)[2:]  # behind self and the hidden states
        keywords = dict(zip(names, args[1:], strict=False)) | keywords
        args = args[:1]
    rest = {key: value for key, value in keywords.items() if key != _HIDDEN}
    return _states(args, keywords), (args[1:], rest)


def _states(args: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """The hidden states that a block is called with."""
    states: Tensor = args[0] if args else keywords[_HIDDEN]
    return states
