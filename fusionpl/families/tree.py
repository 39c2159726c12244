"""What can be seen of a model that no family describes: its stack of blocks, and the order in which its modules run."""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusionpl.errors import FusionError

LATE = 10**9


@dataclass(frozen=True)
class Seen:
    """A module in one forward pass.

    Attributes:
        rank: when it ran first; `LATE` if it did not.
        source, target: where what it read, and what it put out, lie in memory.
    """

    rank: int = LATE
    source: int = 0
    target: int = -1

    def reads(self, other: "Seen") -> bool:
        """Whether it reads what the other puts out, as it is."""
        return self.source == other.target


@dataclass(frozen=True)
class Trace:
    """One forward pass.

    Attributes:
        modules: those that hold parameters themselves, and ran.
        start: when the first block began.
        entry: where the hidden states that a block takes lie in memory.
    """

    modules: Mapping[str, Seen]
    start: int
    entry: int

    def of(self, name: str) -> Seen:
        """What was seen of a module, also if it did not run."""
        return self.modules.get(name, Seen())


def traced(model: nn.Module, stack: str, block: str, run: Callable[[nn.Module], Any]) -> Trace:
    """Runs the model once and records which module reads what another puts out.

    Args:
        model: the model.
        stack, block: paths of the list of blocks, and of the block whose entry is wanted.
        run: runs the model.
    """
    modules: dict[str, Seen] = {}
    tensors: list[Any] = []  # what is alive keeps its place in memory
    starts: list[int] = []
    entries: list[int] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if name not in modules and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                tensors.extend((args[0], output))
                modules[name] = Seen(len(tensors), args[0].data_ptr(), output.data_ptr())

        return hook

    def begin(module: nn.Module, args: Any, keywords: Any) -> None:
        states = args[0] if args else keywords["hidden_states"]
        tensors.append(states)
        starts.append(len(tensors))
        if module is model.get_submodule(block):
            entries.append(states.data_ptr())

    blocks = model.get_submodule(stack).children()
    hooks = [child.register_forward_pre_hook(begin, with_kwargs=True) for child in blocks]
    for name, module in model.named_modules():
        if name and list(module.parameters(recurse=False)):
            hooks.append(module.register_forward_hook(look(name)))
    try:
        with torch.no_grad():
            run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return Trace(modules, starts[0], entries[0])


def stack_of(model: nn.Module) -> tuple[str, list[str]]:
    """The path of the list of blocks with most parameters, and those of lists outside of it.

    Raises:
        FusionError: there is none.
    """
    sizes = {}
    for name, module in model.named_modules():
        blocks = list(module.children())
        if name and blocks and isinstance(module, nn.ModuleList | nn.Sequential):
            alike = len({type(block) for block in blocks}) == 1
            if alike and len(list(blocks[0].parameters())) > 4:  # more than a linear module and a norm
                sizes[name] = sum(parameter.numel() for parameter in module.parameters())
    if not sizes:
        raise FusionError(
            f"{type(model).__name__} has no list of blocks that are alike (a ModuleList or Sequential), "
            "which a family needs"
        )
    best = max(sizes, key=lambda name: sizes[name])
    return best, [name for name in sizes if not f"{name}.".startswith(f"{best}.") and not best.startswith(f"{name}.")]


def offset_of(norm: nn.Module, width: int) -> int | None:
    """What a norm adds to its weights before it multiplies by them: 0, or 1; None where it does something else."""
    probe = copy.deepcopy(norm)
    like = next(probe.parameters())
    row = torch.arange(1.0, width + 1).to(like)
    with torch.no_grad():
        for offset in (0, 1):
            for name, parameter in probe.named_parameters(recurse=False):
                parameter.fill_(-float(offset) if name == "weight" else 0.0)
            if not bool(probe(row).any()):
                return offset
    return None


def rooted(embedding: nn.Module, width: int) -> bool:
    """Whether what an embedding puts out is its weight times the square root of its width."""
    weight = getattr(embedding, "weight", None)
    if not isinstance(embedding, nn.Embedding) or weight is None:
        return False
    if len(inspect.signature(embedding.forward).parameters) != 1:  # it takes no indices (OPT's takes the mask)
        return False
    with torch.no_grad():
        shown = embedding(torch.tensor([len(weight) - 1], device=weight.device))[0]
    return bool(torch.allclose(shown.float(), weight[-1].float() * width**0.5, rtol=1e-2) and weight[-1].any())
