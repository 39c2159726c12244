"""What a problem of an alignment is: axes that take their maps together."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fusionpl.alignment.aligner import Aligner
from fusionpl.alignment.config import AlignConfig
from fusionpl.calibration.moments import Key
from fusionpl.families import Binding, section_of


class Size(NamedTuple):
    """A problem for a solver: a transport plan or a singular value decomposition, [n, m]."""

    kind: Literal["transport", "svd"]
    n: int
    m: int


@dataclass(frozen=True)
class Problem(ABC):
    """Axes that take their maps together.

    Attributes:
        axes: the axes.
        keys: whose activations are compared; each puts the units of its axes side by side. None where weights are the
            evidence.
        magnitudes: the anchor's axes whose mean absolute activation is needed.
    """

    axes: tuple[str, ...]
    keys: tuple[Key, ...] = ()
    magnitudes: tuple[str, ...] = ()

    @property
    def section(self) -> str:
        """The section in which it is solved."""
        return section_of(self.axes[0])

    @property
    def whole(self) -> bool:
        """Whether it looks at the whole network, so that it must be solved before any section is fused."""
        return False

    @abstractmethod
    def check(self, parent: Binding, anchor: Binding, config: AlignConfig) -> None:
        """Raises FusionError where the options do not fit the widths or head counts."""

    @abstractmethod
    def solve(self, work: Aligner) -> None:
        """Gives the axes of `work` their maps."""

    @abstractmethod
    def solves(self, parent: Binding, anchor: Binding) -> Iterable[Size]:
        """The problems that a solver is given."""

    @abstractmethod
    def told(self, axis: str, binding: Binding) -> str:
        """How `axis` gets its map, for a person."""


def sizes_in(axes: Iterable[str], parent: Binding, anchor: Binding) -> tuple[int, int]:
    """The number of units of all `axes` together, in a parent and in the anchor."""
    n, m = (sum(one.axes[axis].size for axis in axes) for one in (parent, anchor))
    return n, m


def seen_at(axis: str, binding: Binding, keys: tuple[Key, ...]) -> str:
    """Where the units of an axis are seen, for a person."""
    if not keys:
        return "rows of " + ", ".join(slot.parameter for slot in binding.writers(axis))
    tap = binding.taps[axis]
    return f"values of {tap.target}" if tap.kind == "parameter" else f"{tap.kind} of {tap.target}"
