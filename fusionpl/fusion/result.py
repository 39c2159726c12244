"""What a fusion made, and where it was put."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from torch import Tensor, nn

from fusionpl.alignment.maps import Maps
from fusionpl.calibration.kept import Kept, Store
from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.errors import FusionError
from fusionpl.families.apply import State, with_parameters
from fusionpl.families.axes import Binding
from fusionpl.families.binding import bind
from fusionpl.fusion.average import averaged
from fusionpl.fusion.config import FuseConfig
from fusionpl.fusion.depth import Matching
from fusionpl.fusion.methods.refinement import Taught
from fusionpl.fusion.parents import AlignedParent
from fusionpl.models.folders import HEAD
from fusionpl.models.save import save_model
from fusionpl.models.separate import Head, model_of
from fusionpl.models.tensors import TensorFile
from fusionpl.transport.maps import TransportMap

MAPS = "maps.safetensors"


class Writer(Protocol):
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
    """A writer that keeps the parameters and makes a model of them.

    Args:
        target: what it looks like.
        kept: where they are kept.
    """

    def __init__(self, target: SectionedModel, kept: Kept) -> None:
        self._target = target
        self._parameters = Store[str, Tensor](kept, "parameters")
        self._names: list[str] = []

    def write(self, state: State) -> None:
        """Keeps the parameters of a section."""
        for name, tensor in state.items():
            self._names.append(name)
            self._parameters[name] = tensor

    def read(self, name: str) -> Tensor:
        """A parameter that was written."""
        return self._parameters[name]

    def finish(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """Nothing to drop: it goes with the object."""

    def model(self) -> nn.Module:
        """A new model, which owns what was written."""
        return with_parameters(self._target.module, {name: self._parameters[name] for name in self._names}).eval()


@dataclass(frozen=True)
class FusionResult:
    """What a fusion made.

    Attributes:
        writer: holds the fused parameters.
        parents: in order, each with its maps; for a rotation and one stream they are in canonical form.
        anchor: index of the anchor.
        target: what the fused network looks like.
        config: what was asked for.
        kept: parameters that stayed the anchor's.
        teaching: what learned refinement made, where it was asked for.
        refitted: the fused model before it was refined, where it was.
        matchings: for parents of another depth than the fused model's, which of their blocks stand for which of its.
        notes: what was decided on the calibration set: which blocks and whose units were taken, a line each.
        warnings: what a reader should know, for example solvers that did not converge, by axis.
        heads: of the parents, with `labels: separate`.
    """

    writer: Writer
    parents: Sequence[AlignedParent]
    anchor: int
    target: SectionedModel
    config: FuseConfig
    kept: frozenset[str] = frozenset()
    teaching: Taught | None = None
    refitted: nn.Module | None = None
    matchings: Sequence[Matching] = ()
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()
    heads: Sequence[Head] = ()

    @property
    def model(self) -> nn.Module:
        """The fused model, with the anchor's architecture, and its width unless another was asked for; in eval mode.

        Refined from a parent it has that parent's architecture.

        Raises:
            FusionError: there is one for each parent, in `models`.
        """
        if self.heads:
            raise FusionError(
                "a fusion with labels separate has a model for each parent, "
                f"{', '.join(head.name for head in self.heads)}; take FusionResult.models"
            )
        return self.network

    @cached_property
    def models(self) -> Mapping[str, nn.Module]:
        """Name of a parent -> the fused model with its head and labels, with `labels: separate`; in eval mode.

        They share one trunk: all but their heads are the same parameters. Signs that no folder's name can have are
        dashes in the names. `predict` takes a batch through all at once.

        Raises:
            FusionError: the parents were fused to one model, `model`.
        """
        if not self.heads:
            raise FusionError("these parents were fused to one, FusionResult.model; labels separate makes one for each")
        binding = bind(self.network, self.binding.family)
        return {head.name: model_of(self.network, head, binding) for head in self.heads}

    @cached_property
    def network(self) -> nn.Module:
        """The fused model or, with `labels: separate`, one with the heads of all parents side by side."""
        return self.writer.model() if self.teaching is None else self.teaching.model

    @property
    def alignments(self) -> list[Maps | None]:
        """The maps of each parent, in order; None for the anchor, whose units stay (but for `strategy joint`)."""
        return [parent.maps for parent in self.parents]

    @property
    def binding(self) -> Binding:
        """The fused network's."""
        return self.target.binding

    @property
    def maps(self) -> Mapping[str, TransportMap]:
        """Axis -> map of the first parent that is not the anchor."""
        others = (maps for index, maps in enumerate(self.alignments) if index != self.anchor)
        return next((maps for maps in others if maps is not None), {})

    def aligned(self, index: int) -> State:
        """The parameters of parent `index` in the anchor's units, made anew at each call."""
        parent = self.parents[index]
        with torch.no_grad():
            return parent.aligned(parent.network.state(), self.target.state(), self.target.binding)

    def aligned_parent(self, index: int) -> nn.Module:
        """Parent `index` in the anchor's units, as a model of its own; with `strategy joint`, its share of the average,
        which is none."""
        return with_parameters(self.target.module, self.aligned(index)).eval()

    def average(self) -> nn.Module:
        """The mean of the aligned parents, without refit and refinement; made anew at each call."""
        with torch.no_grad():
            states = [parent.network.state() for parent in self.parents]
            mean = averaged(self.parents, self.anchor, states, self.kept, self.target.state(), self.target.binding)
            return with_parameters(self.target.module, mean).eval()

    def save(self, folder: str | Path, *, tokenizer: Any = None, card: str = "") -> None:
        """Writes model/ (the fused model in its own library's format), maps.safetensors and config.yaml; with `labels:
        separate` a model-NAME/ for each of `models` in the place of model/.

        Args:
            folder: a run folder; what is there of the same name is replaced.
            tokenizer: of a language model, kept beside it.
            card: Markdown body of the model card.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, model in self.by_folder().items():
            save_model(model, folder / name, tokenizer=tokenizer, card=card)
        self.save_maps(folder)

    def by_folder(self) -> dict[str, nn.Module]:
        """Name of a model folder -> the model that goes there."""
        return {f"{HEAD}{name}": model for name, model in self.models.items()} if self.heads else {"model": self.model}

    def save_maps(self, folder: Path) -> None:
        """Writes maps.safetensors (`parent0/AXIS` -> plan [n_parent, n_anchor]) and config.yaml."""
        maps = {
            f"parent{index}/{axis}": (own, axis)
            for index, own in enumerate(self.alignments)
            if own is not None
            for axis in own
        }
        layout = {name: (own.shape(axis), torch.float32) for name, (own, axis) in maps.items()}
        file = TensorFile(folder / MAPS, layout)
        for name, (own, axis) in maps.items():
            file.write(name, own[axis].plan)
        (folder / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(self.config), sort_keys=False))


def unconverged(parents: Sequence[AlignedParent]) -> list[str]:
    """A line for each parent some of whose maps' solvers did not reach their optimum."""
    lines = []
    for parent in parents:
        bad = parent.maps.unconverged() if parent.maps is not None else {}
        if parent.maps is not None and bad:
            axis, worst = max(bad.items(), key=lambda item: item[1].marginal_error)
            lines.append(
                f"{parent.network.name}: {worst.solver} did not converge on {len(bad)} of {len(parent.maps)} axes, "
                f"worst '{axis}' (marginal error {worst.marginal_error:.1e} after {worst.iterations} iterations); "
                "raise align.reg or use align.solver emd"
            )
    return lines
