"""Parents whose images were prepared differently: all are given the anchor's."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from fusionpl.calibration.network import Network
from fusionpl.models.images import grid_of
from fusionpl.models.pixels import for_pixels, told_differences, told_pixels
from fusionpl.models.preprocessing import ImageProcessing
from fusionpl.models.processors import image_processing, save_image_processing, timm_processing


def said(parent: nn.Module | str | Path, network: Network) -> ImageProcessing | None:
    """How a parent that is named takes its images, as its folder says; None where nothing does."""
    return None if isinstance(parent, nn.Module) or grid_of(network.module) is None else image_processing(parent)


def match_pixels(
    parents: Sequence[nn.Module | str | Path],
    networks: Sequence[Network],
    anchor: int,
    processing: ImageProcessing | None,
) -> list[str]:
    """Rewrites, as it is read, the patch embedding of a named parent that sees a pixel as another number.

    Args:
        parents: see `fuse`.
        networks: the same, opened.
        anchor: index of the anchor.
        processing: how images are prepared; by default as the anchor's folder says.

    Returns:
        What a reader should know, a line each. A model in memory is taken as it is; a line says where its
        `pretrained_cfg` wants other images.

    Raises:
        FusionError: see `for_pixels`.
    """
    reference = networks[anchor]
    if processing is not None and processing.decreed:
        return []
    found = {network.name: said(parent, network) for parent, network in zip(parents, networks, strict=True)}
    whole = {network.name: timm_processing(network.module) for network in networks}
    given = processing or found[reference.name] or whole[reference.name]
    if given is None and not any(found.values()):
        return []
    lines = told_differences(found, reference.name)
    given = given or ImageProcessing()
    if found[reference.name] is None and any(found.values()) and not isinstance(parents[anchor], nn.Module):
        lines.append(
            f"{reference.name}: its folder does not say how images are prepared; it is taken to see them with "
            f"{ImageProcessing().told()}"
        )
    for parent, network in zip(parents, networks, strict=True):
        own, name = found[network.name], network.name
        if isinstance(parent, nn.Module):
            stated = whole[name]
            if stated is not None and not stated.sees_as(given):
                lines.append(
                    f"{name}: its pretrained_cfg wants images of {stated.told()}, and it is given {reference.name}'s, "
                    f"{given.told()}, as it is"
                )
            continue
        moved = for_pixels(network.module, own, given, network.read, network.binding.family, (name, reference.name))
        if moved is not None:
            network.read = lambda key, read=network.read, moved=moved: moved(key, read(key))  # type: ignore[misc]
            lines.append(told_pixels(name, own, reference.name, given))
    return lines


def keep_pixels(folder: Path, model: nn.Module, processing: ImageProcessing) -> None:
    """Writes into a fused model's folder how it takes its images, at the size that it takes."""
    grid = grid_of(model)
    if processing.size is None and grid is not None:
        processing = processing.at(grid.image)
    if processing.size is not None:
        save_image_processing(folder, processing)
