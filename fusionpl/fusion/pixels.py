"""Parents whose images were prepared differently: all are given the anchor's."""

from pathlib import Path

from torch import nn

from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.fusion.team import Team
from fusionpl.models.images import grid_of
from fusionpl.models.pixels import describe_differences, describe_pixels, for_pixels
from fusionpl.models.preprocessing import ImageProcessing
from fusionpl.models.processors import image_processing, save_image_processing, timm_processing


def said(parent: nn.Module | str | Path, network: SectionedModel) -> ImageProcessing | None:
    """How a parent that is named takes its images, as its folder says; None where nothing does."""
    return None if isinstance(parent, nn.Module) or grid_of(network.module) is None else image_processing(parent)


def match_pixels(team: Team, processing: ImageProcessing | None) -> Team:
    """Rewrites, as it is read, the patch embedding of a named parent that sees a pixel as another number.

    Args:
        team: the parents; a model in memory is taken as it is, and a line says where its `pretrained_cfg` wants other
            images.
        processing: how images are prepared; by default as the anchor's folder says.

    Raises:
        FusionError: see `for_pixels`.
    """
    reference = team.reference
    if processing is not None and processing.decreed:
        return team
    both = list(zip(team.sources, team.networks, strict=True))
    of_folder = {network.name: said(parent, network) for parent, network in both}
    of_model = {network.name: timm_processing(network.module) for network in team.networks}
    given = processing or of_folder[reference.name] or of_model[reference.name]
    if given is None and not any(of_folder.values()):
        return team
    lines = describe_differences(of_folder, reference.name)
    given = given or ImageProcessing()
    if of_folder[reference.name] is None and any(of_folder.values()) and not team.in_memory(team.anchor):
        lines.append(
            f"{reference.name}: its folder does not say how images are prepared; it is taken to see them with "
            f"{ImageProcessing().summary()}"
        )
    networks = list(team.networks)
    for index, (parent, network) in enumerate(both):
        own, name = of_folder[network.name], network.name
        if isinstance(parent, nn.Module):
            stated = of_model[name]
            if stated is not None and not stated.sees_as(given):
                lines.append(
                    f"{name}: its pretrained_cfg wants images of {stated.summary()}, and it is given "
                    f"{reference.name}'s, {given.summary()}, as it is"
                )
            continue
        move = for_pixels(network.module, own, given, network.read, network.binding.family, (name, reference.name))
        if move is not None:
            networks[index] = network.moved(network.module, move)
            lines.append(describe_pixels(name, own, reference.name, given))
    return team.of(networks, lines)


def keep_pixels(folder: Path, model: nn.Module, processing: ImageProcessing) -> None:
    """Writes into a fused model's folder how it takes its images, at the size that it takes."""
    grid = grid_of(model)
    if processing.size is None and grid is not None:
        processing = processing.at(grid.image)
    if processing.size is not None:
        save_image_processing(folder, processing)
