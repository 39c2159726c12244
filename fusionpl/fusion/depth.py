"""Parents of different depth: which of their blocks stand for which of the fused network's."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusionpl.alignment.blocks import likeness, matched, spread, telling
from fusionpl.calibration.cursor import CalibrationSet, Cursor
from fusionpl.calibration.cut import Run, cut_into
from fusionpl.calibration.forward import eval_mode
from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.calibration.tokens import select
from fusionpl.errors import FusionError
from fusionpl.families.axes import Binding
from fusionpl.families.binding import bind
from fusionpl.families.family import TAIL
from fusionpl.fusion.config import FuseConfig
from fusionpl.models.resized import resized

# Streams are compared on this many samples and tokens at most, whatever the calibration set has.
_SAMPLES, _ROWS = 256, 2048
# Below this mean likeness, streams have nothing to do with each other.
_FOREIGN = 0.2


@dataclass(frozen=True)
class Matching:
    """How the blocks of a parent stand beside the fused network's.

    Attributes:
        parent: its name.
        runs: block of the fused network -> the parent's blocks that stand for it.
        path: for each boundary of the fused network, from the first to the last, the parent's that stands for it.
        alike: how much the parent's streams (columns) are like the anchor's at the fused network's boundaries (rows):
            linear CKA; None where nothing was run, or nothing compared.
        numbers: the parent's blocks -> their numbers, from 1.
    """

    parent: str
    runs: Mapping[str, Run]
    path: Sequence[int]
    alike: Tensor | None
    numbers: Mapping[str, int]

    @property
    def mean(self) -> float | None:
        """The mean likeness of the streams that were matched, without the two ends, which have no choice."""
        if self.alike is None or len(self.path) < 3:
            return None
        inner = [float(self.alike[row, column]) for row, column in enumerate(self.path)][1:-1]
        return sum(inner) / len(inner)

    @property
    def reduced(self) -> bool:
        """Whether several blocks stand for one somewhere."""
        return any(len(run.blocks) > 1 for run in self.runs.values())

    @property
    def summary(self) -> str:
        """The matching in a line."""
        parts = []
        for run in self.runs.values():
            numbers = "+".join(str(self.numbers[block]) for block in run.blocks) or "-"
            kept = f" (units of {self.numbers[run.kept]})" if run.kept and len(run.blocks) > 1 else ""
            parts.append(numbers + kept)
        mean = "" if self.mean is None else f"; streams alike by {self.mean:.2f} on average (CKA)"
        return f"{self.parent}: blocks {', '.join(parts)} for the fused model's 1 to {len(self.runs)}{mean}"

    @property
    def warning(self) -> str | None:
        """What a user should know of parents that have nothing in common."""
        if self.mean is None or self.mean >= _FOREIGN:
            return None
        return (
            f"{self.parent}: its streams resemble the anchor's nowhere (CKA {self.mean:.2f} on average along the best "
            "matching of blocks); a fusion of such parents is worth little"
        )


def depth_of(networks: Sequence[SectionedModel], anchor: int, config: FuseConfig) -> tuple[int, ...]:
    """The numbers of blocks of the fused network's stacks.

    Raises:
        FusionError: a depth that these parents don't allow, or a family whose blocks are not alike.
    """
    reference = networks[anchor]
    depths = reference.binding.depths
    apart = next((one for one in networks if one.binding.depths != depths), None)
    if apart is None and config.depth in (None, sum(depths)):
        return depths
    family = reference.binding.family
    what = f"parents of different depth ({_blocks(reference)}, {_blocks(apart)})" if apart else f"depth {config.depth}"
    if len(depths) > 1:
        raise FusionError(f"{what}: {family.name} has several stacks of blocks; use parents of one depth")
    if family.stacks[0].shared:
        raise FusionError(
            f"{what}: the blocks of {family.name} share '{family.stacks[0].shared[0]}'; use parents of one depth"
        )
    for network in networks:
        if lacking := _unlike(network.binding):
            raise FusionError(f"{what}: not all blocks of {family.name} have {lacking}; use parents of one depth")
    if config.depth is None:
        return depths
    counts = [network.binding.depth for network in networks]
    if config.strategy == "transport" and config.depth != depths[0]:
        raise FusionError(
            f"strategy transport fuses into the anchor's depth, {depths[0]}; depth {config.depth} needs strategy joint"
        )
    if not min(counts) <= config.depth <= sum(counts):
        raise FusionError(
            f"depth {config.depth} is not between the shallowest parent's, {min(counts)}, and the sum of all, "
            f"{sum(counts)}"
        )
    return (config.depth,)


def match_depths(
    networks: Sequence[SectionedModel], anchor: int, config: FuseConfig, data: CalibrationSet | None = None
) -> tuple[list[SectionedModel], list[Matching]]:
    """Brings parents to the depth of the fused network.

    Args:
        networks: the parents.
        anchor: index of the anchor.
        config: what is asked for.
        data: what streams are compared on; without it blocks are matched evenly.

    Returns:
        The parents, those of another depth cut into its blocks, and a matching for each of these.

    Raises:
        FusionError: see `depth_of`.
    """
    (goal, *others), reference = depth_of(networks, anchor, config), networks[anchor].binding
    if others or all(network.binding.depth == goal for network in networks):
        return list(networks), []
    way = spread(reference.depth, goal)
    alone = [before == after for before, after in pairwise(way)]
    compared = [
        index
        for index, network in enumerate(networks)
        if index == anchor or network.binding.depth != goal or any(alone)
    ]
    streams = {index: _streams(networks[index], data, index) for index in compared} if data else {}
    paths: dict[int, tuple[list[int], Tensor | None]] = {anchor: (way, None)}
    for index, network in enumerate(networks):
        if index == anchor or (network.binding.depth == goal and not any(alone)):
            paths.setdefault(index, (list(range(goal + 1)), None))
            continue
        alike = likeness([streams[anchor][at] for at in way], streams[index]) if streams else None
        path = matched(
            torch.zeros(goal + 1, network.binding.depth + 1) if alike is None else alike, alone,
            at_once=_bare(network.binding),
        )  # fmt: skip
        alone = [lone and before == after for lone, (before, after) in zip(alone, pairwise(path), strict=True)]
        paths[index] = path, alike
    standing = {
        index: [_kept(path, at, streams.get(index)) for at in range(goal)] for index, (path, _) in paths.items()
    }
    paths, standing = _of_first_rank((paths, standing))
    matchings, cut = [], list(networks)
    for index, (path, alike) in sorted(paths.items()):
        network = networks[index]
        if path == list(range(network.binding.depth + 1)):
            continue
        blocks = network.binding.blocks
        module = network.module if network.binding.depth == goal else resized(network.module, depth=goal)
        binding = bind(module, network.binding.family)
        if binding.depth != goal:
            raise FusionError(f"a {type(network.module).__name__} can't be built with {goal} blocks; use one depth")
        runs = {
            block: Run(blocks[before:after], None if which is None else blocks[which])
            for block, (before, after), which in zip(binding.blocks, pairwise(path), standing[index], strict=True)
        }
        cut[index] = cut_into(network, module, binding, runs)
        numbers = {block: number for number, block in enumerate(blocks, 1)}
        matchings.append(Matching(network.name, runs, path, alike, numbers))
    return cut, matchings


def _streams(network: SectionedModel, data: CalibrationSet, index: int) -> list[Tensor]:
    """The hidden states at every boundary of a network's blocks, of some tokens, [rows, n]."""
    cursor = Cursor(network, data, f"stream {index}")
    few = [batch for batch in data if data.firsts[batch] - data.firsts[0] < _SAMPLES]
    streams = []
    with torch.no_grad(), eval_mode(network.module):
        for section in network.binding.sections:
            if section == TAIL:
                continue
            state = network.states(section)
            rows = []
            for batch in few:
                out = cursor.step(section, state, batch).out
                assert out is not None
                rows.append(select(out, "all", data.mask(batch, network.binding, f"{section}.out")))
            whole = torch.cat(rows)
            streams.append(whole[:: -(-len(whole) // _ROWS)].float())
    return streams


def _bare(binding: Binding) -> bool:
    """Whether no norm ends what stands before the blocks of a post-LN network, so that none that adds nothing can
    be the first: see `cut_into`."""
    return binding.family.norm == "post" and binding.end_norm(binding.sections[0]) is None


def _kept(path: Sequence[int], step: int, streams: Sequence[Tensor] | None) -> int | None:
    """The number of the block that stands for one step of a path."""
    before, after = path[step], path[step + 1]
    if before == after:
        return None
    return after - 1 if streams is None else before + telling(streams[before : after + 1])


def _of_first_rank(own: Any) -> Any:
    """What the first rank found: its samples decide for all."""
    if not dist.is_initialized():
        return own
    shared = [own]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _blocks(network: SectionedModel) -> str:
    return f"{network.name} has {' and '.join(map(str, network.binding.depths))} blocks"


def _unlike(binding: Binding) -> str | None:
    """A parameter that some blocks have and others lack."""
    held = [{name.removeprefix(block) for name in binding.uses[block]} for block in binding.blocks]
    return next(_differing(held), None)


def _differing(held: Sequence[set[str]]) -> Iterator[str]:
    for names in held:
        yield from sorted(held[0] ^ names)
