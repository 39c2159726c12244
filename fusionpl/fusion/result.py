"""What a fusion made, and where it was put."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from torch import Tensor, nn

from fusionpl.alignment.maps import Alignment
from fusionpl.calibration.kept import Kept
from fusionpl.calibration.network import Network
from fusionpl.families import Binding, State, with_parameters
from fusionpl.fusion.average import averaged
from fusionpl.fusion.config import FuseConfig
from fusionpl.fusion.depth import Matching
from fusionpl.fusion.parents import AlignedParent
from fusionpl.fusion.refine import Taught
from fusionpl.models.save import save_model
from fusionpl.models.tensors import TensorFile
from fusionpl.transport.maps import TransportMap

MAPS = "maps.safetensors"


class Sink(Protocol):
    """Takes the fused parameters, section by section, and makes the model of them."""

    def write(self, state: State) -> None:
        """Takes the parameters of a section; the model has them in the anchor's types."""

    def read(self, name: str) -> Tensor:
        """Gives a parameter back that was written."""

    def finish(self) -> None:
        """All are written."""

    def close(self) -> None:
        """Nothing more is written; what is not finished is dropped."""

    def model(self) -> nn.Module:
        """The fused model."""


class InMemory:
    """A sink that keeps the parameters and makes a model of them.

    Args:
        goal: what it looks like.
        kept: where they are kept.
    """

    def __init__(self, goal: Network, kept: Kept) -> None:
        self._goal, self._kept = goal, kept
        self._names: list[str] = []

    def write(self, state: State) -> None:
        """Keeps the parameters of a section."""
        for name, tensor in state.items():
            self._names.append(name)
            self._kept[name] = tensor

    def read(self, name: str) -> Tensor:
        """A parameter that was written."""
        found: Tensor = self._kept[name]
        return found

    def finish(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """Nothing to drop: it goes with the object."""

    def model(self) -> nn.Module:
        """A new model, which owns what was written."""
        return with_parameters(self._goal.module, {name: self._kept[name] for name in self._names}).eval()


class FusionResult:
    """What a fusion made.

    Args:
        sink: holds the fused parameters.
        parents: in order, each with its alignment; for a rotation and one stream they are in canonical form.
        anchor: index of the anchor.
        goal: what the fused network looks like.
        config: what was asked for.
        kept: parameters that stayed the anchor's.

    Attributes:
        refitted: the fused model before it was refined, where it was; else None.
        teaching: what was chosen then, and what it started from.
        matchings: for parents of another depth than the fused model's, which of their blocks stand for which of its.
        notes: what was decided on the calibration set: which blocks and whose units were taken, a line each.
        warnings: what a reader should know, for example solvers that did not converge, by axis.
    """

    def __init__(
        self,
        sink: Sink,
        parents: Sequence[AlignedParent],
        anchor: int,
        goal: Network,
        config: FuseConfig,
        kept: frozenset[str],
    ) -> None:
        self._sink, self.parents, self.anchor, self.config, self._kept = sink, list(parents), anchor, config, kept
        self._goal = goal
        self.refitted: nn.Module | None = None
        self.teaching: Taught | None = None
        self.warnings: list[str] = []
        self.matchings: Sequence[Matching] = ()
        self.notes: list[str] = []

    @cached_property
    def model(self) -> nn.Module:
        """The fused model, with the anchor's architecture, and its width unless another was asked for; in eval mode.

        Refined from a parent it has that parent's architecture.
        """
        return self._sink.model()

    def taught(self, found: Taught) -> None:
        """Puts what was refined into the place of the fused model, which stays as `refitted`."""
        self.refitted, self.teaching = self.model, found
        self.model = found.model
        self.notes.append(found.told)

    @property
    def alignments(self) -> list[Alignment | None]:
        """One a parent, in order; None for the anchor, whose units stay (but for `strategy joint`)."""
        return [parent.alignment for parent in self.parents]

    @property
    def binding(self) -> Binding:
        """The fused network's."""
        return self._goal.binding

    @property
    def maps(self) -> Mapping[str, TransportMap]:
        """Axis -> map of the first parent that is not the anchor."""
        others = (alignment for index, alignment in enumerate(self.alignments) if index != self.anchor)
        return next((alignment.maps for alignment in others if alignment), {})

    def aligned(self, index: int) -> State:
        """The parameters of parent `index` in the anchor's units, made anew at each call."""
        parent = self.parents[index]
        with torch.no_grad():
            return parent.aligned(parent.network.state(), self._goal.state(), self._goal.binding)

    def aligned_parent(self, index: int) -> nn.Module:
        """Parent `index` in the anchor's units, as a model of its own; with `strategy joint`, its share of the average,
        which is none."""
        return with_parameters(self._goal.module, self.aligned(index)).eval()

    def average(self) -> nn.Module:
        """The mean of the aligned parents, without refit and refinement; made anew at each call."""
        with torch.no_grad():
            states = [parent.network.state() for parent in self.parents]
            found = averaged(self.parents, self.anchor, states, self._kept, self._goal.state(), self._goal.binding)
            return with_parameters(self._goal.module, found).eval()

    def save(self, folder: str | Path, *, tokenizer: Any = None, card: str = "") -> None:
        """Writes model/ (the fused model in its own library's format), maps.safetensors and config.yaml.

        Args:
            folder: a run folder; what is there of the same name is replaced.
            tokenizer: of a language model, kept beside it.
            card: Markdown body of the model card.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, folder / "model", tokenizer=tokenizer, card=card)
        self.save_maps(folder)

    def save_maps(self, folder: Path) -> None:
        """Writes maps.safetensors (`parent0/AXIS` -> plan [n_parent, n_anchor]) and config.yaml."""
        maps = {
            f"parent{index}/{axis}": (alignment.maps, axis)
            for index, alignment in enumerate(self.alignments)
            if alignment
            for axis in alignment.maps
        }
        layout = {name: (found.shape(axis), torch.float32) for name, (found, axis) in maps.items()}
        file = TensorFile(folder / MAPS, layout)
        for name, (found, axis) in maps.items():
            file.write(name, found[axis].plan)
        (folder / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(self.config), sort_keys=False))
