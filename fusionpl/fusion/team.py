"""The parents of a fusion, opened once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from fusionpl.calibration.forward import device_named, device_of, has_float64
from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.errors import FusionError
from fusionpl.families.axes import Binding
from fusionpl.families.binding import bind
from fusionpl.families.family import Family
from fusionpl.models.labels import NUMBERS, Kind, kind_of
from fusionpl.models.load import load_model
from fusionpl.models.opened import ModelFolder, open_model
from fusionpl.models.separate import Head
from fusionpl.models.settings import compare_settings

Parent = nn.Module | str | Path


@dataclass(frozen=True)
class Team:
    """Parents and what is known of them before anything is run.

    Attributes:
        networks: the parents, read and run section by section.
        anchor: index of the one whose units the others are brought to.
        sources: where each comes from.
        folders: for each, the folder that its weights are read from as they are needed; None for a model in memory.
        lines: what a reader should know of them.
        heads: of parents whose heads stand side by side, one for each; see `match_heads`.
    """

    networks: tuple[SectionedModel, ...]
    anchor: int
    sources: tuple[Parent, ...]
    folders: tuple[ModelFolder | None, ...]
    lines: tuple[str, ...] = ()
    heads: tuple[Head, ...] = ()

    def __len__(self) -> int:
        return len(self.networks)

    @property
    def names(self) -> list[str]:
        """How messages call the parents."""
        return [network.name for network in self.networks]

    @property
    def reference(self) -> SectionedModel:
        """The anchor."""
        return self.networks[self.anchor]

    @property
    def bindings(self) -> list[Binding]:
        """The parents'."""
        return [network.binding for network in self.networks]

    @property
    def binding(self) -> Binding:
        """The anchor's."""
        return self.reference.binding

    @property
    def missing(self) -> list[frozenset[str]]:
        """For each parent, the blocks of the fused network that it has not."""
        return [network.cut.missing if network.cut else frozenset() for network in self.networks]

    @property
    def kind(self) -> Kind:
        """What the parents' outputs mean, where they have no heads of their own."""
        return kind_of(self.reference.module)

    @property
    def classifies(self) -> bool:
        """Whether the parents tell the same classes, or tags, from each other."""
        return "classes" in self.binding.axes and self.kind != NUMBERS and not self.heads

    def in_memory(self, index: int) -> bool:
        """Whether a parent was given as a model."""
        return isinstance(self.sources[index], nn.Module)

    def of(self, networks: Iterable[SectionedModel], lines: Iterable[str] = ()) -> "Team":
        """The same parents in another form, and more to say of them."""
        return replace(self, networks=tuple(networks), lines=(*self.lines, *lines))

    def noting(self, lines: Iterable[str]) -> "Team":
        """The same parents, and more to say of them."""
        return replace(self, lines=(*self.lines, *lines))


def open_parents(
    parents: Sequence[Parent],
    names: Sequence[str],
    anchor: int = 0,
    device: torch.device | str | None = None,
    *,
    allow_pickle: bool = False,
    family: Family | None = None,
) -> Team:
    """Binds each parent; of one that is named no weight is read where its library allows that.

    Args:
        parents: models, or anything `load_model` takes.
        names: how messages call them.
        anchor: index of the anchor.
        device: where those that are named go; by default where the first model is, or the CPU.
        allow_pickle: see `load_model`.
        family: see `bind`.

    Raises:
        FusionError: see `load_model` and `bind`; there is no such device.
    """
    homes = [device_of(parent) for parent in parents if isinstance(parent, nn.Module)]
    home = next(iter(homes), torch.device("cpu")) if device is None else device_named(device)
    networks: list[SectionedModel] = []
    folders: list[ModelFolder | None] = []
    for parent, name in zip(parents, names, strict=True):
        folder = None
        if isinstance(parent, nn.Module):
            networks.append(SectionedModel(parent, bind(parent, family), name))
        elif (folder := open_model(parent, allow_pickle=allow_pickle)) is not None:
            for module in folder.module.modules():
                for key, buffer in module.named_buffers(recurse=False):
                    module._buffers[key] = buffer.to(home)
            binding = bind(folder.module, family)
            networks.append(SectionedModel(folder.module, binding, name, read=folder.read, device=home))
        else:
            model = load_model(parent, allow_pickle=allow_pickle).to(home)
            networks.append(SectionedModel(model, bind(model, family), name))
        folders.append(folder)
    return Team(tuple(networks), anchor, tuple(parents), tuple(folders))


def check_devices(team: Team) -> None:
    """Raises FusionError where parents are on several devices, or on one without float64."""
    first = team.networks[0]
    for network in team.networks:
        if network.device != first.device:
            raise FusionError(
                f"{first.name} is on {first.device}, {network.name} on {network.device}; move them to one with "
                "parent.to(device)"
            )
    if not has_float64(first.device):
        raise FusionError(
            f"the parents are on {first.device}, which has no float64; fuse them on the CPU: parent.to('cpu')"
        )


def differing_settings(team: Team) -> list[str]:
    """A line for each setting that no tensor shows and that differs; see `compare_settings`."""
    return compare_settings({network.name: network.module for network in team.networks}, team.reference.name)


def check_count(count: int) -> None:
    """Raises FusionError for fewer than two parents."""
    if count < 2:
        raise FusionError(f"fusion needs at least two parents, not {count}; give --parents A B")
