"""Parents on their way through the sections of a network, side by side."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from fusionpl.calibration.cursor import CalibrationSet, Cursor
from fusionpl.calibration.forward import eval_mode
from fusionpl.calibration.observe import Statistics, Wanted, observe
from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.families.apply import State
from fusionpl.fusion.team import Team
from fusionpl.transport.products import full_float32


class Walk:
    """Parents over one calibration set; of each no more than one section is in memory.

    Args:
        team: the parents.
        data: the calibration set; None where nothing is run.
    """

    def __init__(self, team: Team, data: CalibrationSet | None) -> None:
        self.team, self._data = team, data
        self.readers = [_Reader(network) for network in team.networks]
        # a calibration set of which this rank has no batch is empty, and still one
        self.cursors = (
            [] if data is None else [Cursor(network, data, f"parent {at}") for at, network in enumerate(team.networks)]
        )

    @property
    def data(self) -> CalibrationSet:
        """The calibration set."""
        assert self._data is not None  # the plan says whether anything is run
        return self._data

    def head(self, samples: int) -> "Walk":
        """The same parents over the first samples alone."""
        return Walk(self.team, self.data.head(samples))

    def states(self, section: str) -> list[State]:
        """The parameters that a section uses, of every parent."""
        return [read(section) for read in self.readers]

    def own(self, section: str, state: Mapping[str, torch.Tensor]) -> State:
        """Of the parameters that a section uses, those that belong to it."""
        return {name: tensor for name, tensor in state.items() if self.team.binding.owners[name] == section}

    def observe(self, wanted: Wanted, states: Sequence[State], *, others: bool) -> Statistics:
        """Takes the batches through a section; where nothing is asked of the others, the anchor goes alone.

        Args:
            wanted: what to collect.
            states: the parents' parameters of the section.
            others: whether the parents beside the anchor go too.
        """
        if others:
            return observe(self.cursors, self.team.anchor, states, self.data, wanted)
        anchor = self.team.anchor
        return observe([self.cursors[anchor]], 0, [states[anchor]], self.data, wanted)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Where networks are run: without gradients and dropout, products in full float32."""
        modules = [form.module for network in self.team.networks for form in (network, network.original)]
        with torch.no_grad(), full_float32(), eval_mode(*modules):
            yield


class _Reader:
    """Reads the parameters of a section and holds them until another section is asked for."""

    def __init__(self, network: SectionedModel) -> None:
        self._network, self._section, self._state = network, "", State()

    def __call__(self, section: str) -> State:
        if section != self._section:
            self._section, self._state = "", State()  # let go first: two blocks are not in memory at once
            self._section, self._state = section, self._network.parameters(section)
        return self._state
