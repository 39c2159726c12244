"""Parents that were finetuned from one base: their plain average is often as good as a fusion."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.models.lineage import base_models

# Matrices that are compared, spread over all blocks. Those of independent seeds have cosines of about 0.
MATRICES, ALIKE = 8, 0.5


def kinship(networks: Sequence[SectionedModel], sources: Sequence[nn.Module | str | Path], anchor: int) -> list[str]:
    """What a reader should know of parents that share a base with the anchor, a line each.

    Args:
        networks: the parents, of one family.
        sources: where they come from; cards are read of those that are named.
        anchor: index of the anchor.
    """
    reference, named = networks[anchor], [_bases(source) for source in sources]
    lines = []
    for index, network in enumerate(networks):
        if index == anchor:
            continue
        alike, shared = weights_alike(reference, network), sorted(named[anchor] & named[index])
        reasons = [f"their cards name {shared[0]}"] if shared else []
        if alike is not None and alike >= ALIKE:
            reasons.append(f"their weights are alike before any alignment, with a cosine of {alike:.2f}")
        if reasons:
            lines.append(
                f"{reference.name} and {network.name} share one base ({'; '.join(reasons)}): the plain average of such "
                "parents is often as good as a fusion; compare the rows vanilla and fused"
            )
    return lines


def weights_alike(a: SectionedModel, b: SectionedModel) -> float | None:
    """The median cosine between some large weights of two networks as they are; None where their shapes differ.

    Gains of norms are left out: they are alike in all networks.
    """
    parameters = [dict(network.module.named_parameters()) for network in (a, b)]
    names = [
        name
        for name in dict.fromkeys(slot.parameter for slot in a.binding.slots if slot.section in a.binding.blocks)
        if name in parameters[0] and parameters[0][name].ndim > 1
    ]
    if not names or any(
        name not in parameters[1] or parameters[0][name].shape != parameters[1][name].shape for name in names
    ):
        return None
    step = -(-len(names) // MATRICES)
    cosines = sorted(_cosine(a, b, name) for name in names[::step])
    return cosines[len(cosines) // 2]


def _cosine(a: SectionedModel, b: SectionedModel, name: str) -> float:
    """Of one parameter; here, so that no more than one is in memory."""
    ours, theirs = (network.read(name).to(network.device, torch.float32).flatten() for network in (a, b))
    return float(functional.cosine_similarity(ours, theirs, dim=0))


def _bases(source: Any) -> frozenset[str]:
    return frozenset() if isinstance(source, nn.Module) else base_models(str(source))
