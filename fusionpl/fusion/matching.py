"""What parents answer and how they are padded, brought to one before they are fused."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from fusionpl.calibration.network import Network
from fusionpl.errors import FusionError
from fusionpl.families import bind
from fusionpl.models.labels import IN_WORDS, Kind
from fusionpl.models.opened import ModelFolder
from fusionpl.models.save import class_names
from fusionpl.models.tags import united, with_tags
from fusionpl.models.token_settings import end_of, pad_with, padding_of, pads_text
from fusionpl.models.tokenizers import load_tokenizer


def check_kinds(kinds: Mapping[str, Kind]) -> None:
    """Raises FusionError where the outputs of parents (name -> kind) mean different things."""
    (first, ours), *others = kinds.items()
    for name, theirs in others:
        if theirs != ours:
            raise FusionError(
                f"parents whose outputs mean different things: {first} gives {IN_WORDS[ours]}, {name} gives "
                f"{IN_WORDS[theirs]} (problem_type {ours} and {theirs}); take parents of one kind, or mend "
                "problem_type in config.json"
            )


def match_tags(opened: list[tuple[Network, ModelFolder | None]], anchor: int) -> list[str]:
    """Gives parents of tags those of all of them, by their names."""
    names = united({network.name: network.module for network, _ in opened}, opened[anchor][0].name)
    lines = []
    for index, (network, folder) in enumerate(opened):
        family = network.binding.family
        if names is None or (found := with_tags(network.module, names, family)) is None:
            continue
        module, moved = found
        own, read = class_names(network.module) or (), network.read
        opened[index] = (
            Network(
                module, bind(module, family), network.name, device=network.device, absent=network.absent,
                read=lambda name, read=read, moved=moved: moved(name, read(name)),  # type: ignore[misc]
            ),
            folder,
        )  # fmt: skip
        if set(own) < set(names):
            lines.append(f"{network.name} knows {len(own)} of the {len(names)} tags of all parents; it gives no other")
    return lines


def match_padding(parents: Sequence[nn.Module | str | Path], networks: Sequence[Network], anchor: int) -> list[str]:
    """Gives classifiers that are named, read their answer at the last token and have none for padding, that of the
    anchor, or of another parent, or the anchor's end of text; their tokens have the anchor's numbers.

    Returns:
        A line for each that got one.

    Raises:
        FusionError: one is a model in memory, which is left as it is, or has no end of text.
    """
    lacking = [
        (parent, network)
        for parent, network in zip(parents, networks, strict=True)
        if pads_text(network.module) and padding_of(network.module) is None
    ]
    if not lacking:
        return []
    known = [padding_of(network.module) for network in (networks[anchor], *networks) if pads_text(network.module)]
    source = parents[anchor]
    tokenizer = None if isinstance(source, nn.Module) else load_tokenizer(source)
    ends = [getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None)]
    number = next((one for one in (*known, *ends, end_of(networks[anchor].module)) if one is not None), None)
    for parent, network in lacking:
        if isinstance(parent, nn.Module) or number is None:
            raise FusionError(
                f"{network.name} has no pad_token_id, so a {type(network.module).__name__} classifies one text at a "
                "time; set pad_token_id in its config to the token that texts are padded with, such as its eos_token_id"
            )
        pad_with(network.module, number)
    return [f"{network.name} has no pad_token_id: texts are padded with token {number}" for _, network in lacking]
