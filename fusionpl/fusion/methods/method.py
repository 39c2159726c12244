"""What a method of fusion is: which problems it poses, and in which form it takes the parents."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fusionpl.alignment.problem import Observed, Problem
from fusionpl.families.apply import State
from fusionpl.families.axes import Binding
from fusionpl.fusion.config import FuseConfig

Prepare = Callable[[Mapping[str, Tensor], Binding, str, str], State]


@dataclass(frozen=True)
class Method:
    """How parents are fused; a new one is a file beside this, and a line in `methods/__init__.py`.

    Attributes:
        problems: (binding of the fused network, configuration) -> the problems whose solutions are the parents' maps.
        form: configuration -> what is done to the parameters of a section when they are read; None leaves them as they
            are.
        hindrance: (a parent's binding, configuration) -> why the parent can't be fused so; None where it can.
        instead: what to use where it can't.
        remarks: (problems, parents by name, the same beside the fused network) -> what a reader should know, a line
            each.
    """

    problems: Callable[[Binding, FuseConfig], list[Problem]]
    form: Callable[[FuseConfig], Prepare | None]
    hindrance: Callable[[Binding, FuseConfig], str | None]
    instead: str
    remarks: Callable[[Sequence[Problem], Mapping[str, Binding], Observed], list[str]] = lambda *_: []
