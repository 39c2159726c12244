"""Brings parents to one: the anchor's size and preparation of images, its tokens, its padding, the tags of all.

Each step takes a team and gives one, whose `lines` say what it did.
"""

from collections.abc import Mapping

from torch import nn

from fusionpl.errors import FusionError
from fusionpl.families.binding import bind
from fusionpl.families.family import VOCABULARY
from fusionpl.fusion.pixels import match_pixels
from fusionpl.fusion.team import Team
from fusionpl.models.adapters import adapter_beside
from fusionpl.models.images import at_image_size, describe_resampling
from fusionpl.models.labels import IN_WORDS, Kind
from fusionpl.models.pipelines import check_tokenizers
from fusionpl.models.preprocessing import ImageProcessing
from fusionpl.models.save import class_names
from fusionpl.models.tags import united, with_tags
from fusionpl.models.token_settings import check_token_settings, end_of, pad_with, padding_of, pads_text
from fusionpl.models.tokenizers import load_tokenizer
from fusionpl.models.vocabulary import Vocabulary, renumber


def matched(team: Team, processing: ImageProcessing | None = None) -> Team:
    """Parents that see images, tokens and tags alike.

    Args:
        team: the parents as they were opened.
        processing: how images are prepared, in place of what the anchor's folder says.

    Raises:
        FusionError: parents that cut images into patches of different size, or can't take images as they are prepared;
            see `check_tokenizers`, `match_padding` and `check_token_settings`.
    """
    team = team.noting(
        line for folder in team.folders if folder is not None and (line := adapter_beside(folder.path)) is not None
    )
    team = match_pixels(match_images(team), processing)
    team = match_padding(match_tags(match_vocabularies(team)))
    # The anchor first, whose settings the fused model has.
    modules = {network.name: network.module for network in (team.reference, *team.networks)}
    return team.noting(check_token_settings(modules))


def match_images(team: Team) -> Team:
    """Gives parents the anchor's size of images, by resampled position embeddings."""
    reference, family = team.reference, team.binding.family
    networks, lines = list(team.networks), []
    for index, network in enumerate(networks):
        if network.binding.family.name != family.name:  # which is refused later
            continue
        names = network.name, reference.name
        if (resampled := at_image_size(network.module, reference.module, family, names)) is not None:
            networks[index] = network.moved(*resampled)
            lines.append(describe_resampling(network.name, network.module, reference.name, reference.module))
    return team.of(networks, lines)


def match_vocabularies(team: Team) -> Team:
    """Gives parents that are named, and number the same tokens differently, the anchor's numbers.

    Where the anchor is a model, or has no tokenizer, nothing is matched.

    Raises:
        FusionError: see `check_tokenizers`.
    """
    reference, source, family = team.reference, team.sources[team.anchor], team.binding.family
    vocabulary = None if isinstance(source, nn.Module) else Vocabulary.of(source, reference.module, family)
    networks, lines = list(team.networks), []
    for index, (parent, network, folder) in enumerate(zip(team.sources, team.networks, team.folders, strict=True)):
        if VOCABULARY not in network.binding.axes or isinstance(parent, nn.Module) or isinstance(source, nn.Module):
            continue
        tokenizer = load_tokenizer(parent)
        if vocabulary is None or tokenizer is None:
            if vocabulary is not None or tokenizer is not None:
                has, lacks = (network, reference) if vocabulary is None else (reference, network)
                lines.append(
                    f"{lacks.name} has no tokenizer: its tokens are taken to be those of {has.name}, numbered and cut "
                    "as there; copy its own beside it to have that checked"
                )
            continue
        lines += check_tokenizers({reference.name: vocabulary.tokenizer, network.name: tokenizer})
        renumbering = vocabulary.renumbering(tokenizer, network.binding.axes[VOCABULARY].size)
        if renumbering is not None:
            move = renumber(network.module, renumbering, family, name=network.name)
            # A parent that was loaded whole has been renumbered where it is.
            moved = network.moved(network.module, move) if folder is not None else network
            missing_tokens = renumbering.missing_tokens if len(renumbering.missing_tokens) else None
            networks[index] = moved.but(binding=bind(network.module, family), missing_tokens=missing_tokens)
            lines.append(renumbering.summary(network.name, reference.name))
    return team.of(networks, lines)


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


def match_tags(team: Team) -> Team:
    """Gives parents of tags those of all of them, by their names."""
    names = united({network.name: network.module for network in team.networks}, team.reference.name)
    networks, lines = list(team.networks), []
    for index, network in enumerate(networks):
        if names is None or (extended := with_tags(network.module, names, network.binding.family)) is None:
            continue
        own = class_names(network.module) or ()
        networks[index] = network.moved(*extended)
        if set(own) < set(names):
            lines.append(f"{network.name} knows {len(own)} of the {len(names)} tags of all parents; it gives no other")
    return team.of(networks, lines)


def match_padding(team: Team) -> Team:
    """Gives classifiers that are named, read their answer at the last token and have none for padding, that of the
    anchor, or of another parent, or the anchor's end of text; their tokens have the anchor's numbers.

    Raises:
        FusionError: one is a model in memory, which is left as it is, or has no end of text.
    """
    lacking = [
        (parent, network)
        for parent, network in zip(team.sources, team.networks, strict=True)
        if pads_text(network.module) and padding_of(network.module) is None
    ]
    if not lacking:
        return team
    networks = (team.reference, *team.networks)
    known = [padding_of(network.module) for network in networks if pads_text(network.module)]
    source = team.sources[team.anchor]
    tokenizer = None if isinstance(source, nn.Module) else load_tokenizer(source)
    ends = [getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None)]
    number = next((one for one in (*known, *ends, end_of(team.reference.module)) if one is not None), None)
    for parent, network in lacking:
        if isinstance(parent, nn.Module) or number is None:
            raise FusionError(
                f"{network.name} has no pad_token_id, so a {type(network.module).__name__} classifies one text at a "
                "time; set pad_token_id in its config to the token that texts are padded with, such as its eos_token_id"
            )
        pad_with(network.module, number)
    return team.noting(
        f"{network.name} has no pad_token_id: texts are padded with token {number}" for _, network in lacking
    )
