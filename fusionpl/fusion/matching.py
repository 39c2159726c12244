"""Brings parents to one: the anchor's size and preparation of images, its tokens, its padding, the classes of all.

Each step takes a team and gives one, whose `lines` say what it did.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from fusionpl.errors import FusionError
from fusionpl.families.binding import bind
from fusionpl.families.family import VOCABULARY
from fusionpl.fusion.config import Labels
from fusionpl.fusion.pixels import match_pixels, said
from fusionpl.fusion.team import Team
from fusionpl.models.adapters import adapter_beside
from fusionpl.models.channels import at_channels
from fusionpl.models.classes import united, with_classes
from fusionpl.models.images import at_image_size, describe_resampling
from fusionpl.models.labels import IN_SHORT, IN_WORDS, NUMBERS, Kind, kind_of
from fusionpl.models.pipelines import check_tokenizers
from fusionpl.models.preprocessing import ImageProcessing
from fusionpl.models.save import class_names
from fusionpl.models.separate import heads_of, side_by_side
from fusionpl.models.token_settings import check_token_settings, end_of, pad_with, padding_of, pads_text
from fusionpl.models.tokenizers import load_tokenizer
from fusionpl.models.vocabulary import Vocabulary, renumber


def matched(team: Team, processing: ImageProcessing | None = None, labels: Labels = "union") -> Team:
    """Parents that see images, tokens and classes alike.

    Args:
        team: the parents as they were opened.
        processing: how images are prepared, in place of what the anchor's folder says.
        labels: see `match_classes` and, for `separate`, `match_heads`.

    Raises:
        FusionError: parents that cut images into patches of different size, or can't take images as they are prepared;
            see `at_channels`, `check_tokenizers`, `match_classes`, `match_heads`, `match_padding` and
            `check_token_settings`.
    """
    team = team.noting(
        line for folder in team.folders if folder is not None and (line := adapter_beside(folder.path)) is not None
    )
    team = match_pixels(match_channels(match_images(team)), processing)
    team = match_vocabularies(team)
    team = match_padding(match_heads(team) if labels == "separate" else match_classes(team, labels))
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


def match_channels(team: Team) -> Team:
    """Gives parents of grey images the anchor's channels, or parents of colour images its one."""
    reference, networks, lines = team.reference, list(team.networks), []
    for index, (parent, network) in enumerate(zip(team.sources, team.networks, strict=True)):
        names = network.name, reference.name
        changed = at_channels(network.module, reference.module, partial(said, parent, network), names)
        if changed is not None:
            networks[index] = network.moved(*changed)
            lines.append(
                f"{network.name}: trained on images of another number of channels, its patch embedding is rewritten "
                f"for {reference.name}'s"
            )
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
                f"{IN_WORDS[theirs]} (problem_type {ours} and {theirs}); take parents of one kind, keep a "
                "head for each with labels separate, or mend problem_type in config.json"
            )


def match_classes(team: Team, labels: Labels) -> Team:
    """Gives parents the classes, or tags, of all of them, by their names; parents without names are taken by number.

    Args:
        team: the parents.
        labels: `union`: the anchor's classes and then the others', each once; `anchor`: the anchor's alone.

    Raises:
        FusionError: outputs of different kinds; classes without names that are not as many; two of one name; with
            `anchor` a parent that knows none of the anchor's classes.
    """
    check_kinds({network.name: kind_of(network.module) for network in team.networks})
    if "classes" not in team.binding.axes or team.kind == NUMBERS:
        return team
    names = {network.name: own for network in team.networks if (own := class_names(network.module)) is not None}
    counts = {network.name: network.binding.axes["classes"].size for network in team.networks}
    if len(names) < len(team):
        _check_numbers(counts, names)
    if len(set(names.values())) < 2:
        return team
    first = team.reference.name if team.reference.name in names else next(iter(names))
    classes = names[first] if labels == "anchor" else united(names, first)
    networks, lines = list(team.networks), []
    for index, network in enumerate(networks):
        own = names.get(network.name, ())
        if own and not set(own) & set(classes):
            raise FusionError(
                f"{network.name} ('{own[0]}', ...) knows none of the classes of {first} ('{classes[0]}', ...), and "
                "labels is anchor; use labels union"
            )
        if network.name in names and (changed := with_classes(network.module, classes, network.binding.family)):
            networks[index] = network.moved(*changed)
            lines.append(_in_words(network.name, own, classes, IN_SHORT[team.kind]))
    return team.of(networks, [*lines, *_nearly_alike(names)])


def match_heads(team: Team) -> Team:
    """Puts the heads of parents side by side, whatever they say: each parent gives its own outputs among those of all.

    Raises:
        FusionError: see `heads_of`.
    """
    modules = {network.name: network.module for network in team.networks}
    heads = heads_of(modules, team.bindings)
    networks = [
        network.moved(*side_by_side(head, heads, network.binding.family))
        for network, head in zip(team.networks, heads, strict=True)
    ]
    return replace(team.of(networks), heads=heads)


def _check_numbers(counts: Mapping[str, int], names: Mapping[str, Sequence[str]]) -> None:
    """Raises FusionError where classes without names can't be taken by number."""
    (first, ours), *others = counts.items()
    without = next(name for name in counts if name not in names)
    for name, theirs in others:
        if theirs != ours:
            raise FusionError(
                f"{first} has {ours} classes, {name} has {theirs}, and {without} has no names for its own; name them "
                "in id2label (of timm in label_names), so that they can be told apart"
            )
    if len(set(names.values())) > 1:
        raise FusionError(
            f"{without} has no names for its classes, and {' and '.join(names)} name theirs differently; name them in "
            "id2label (of timm in label_names)"
        )


def _in_words(name: str, own: Sequence[str], classes: Sequence[str], what: str) -> str:
    known, dropped = [one for one in own if one in classes], len(set(own) - set(classes))
    if len(known) == len(classes):
        return f"{name} has its {what} in another order" + (f"; {dropped} of its own are dropped" if dropped else "")
    return f"{name} knows {len(known)} of the {len(classes)} {what} of all parents; it gives no other" + (
        f"; {dropped} of its own are dropped" if dropped else ""
    )


def _nearly_alike(names: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for classes of different parents whose names differ in capitals alone."""
    written: dict[str, tuple[str, str]] = {}
    for model, own in names.items():
        for name in own:
            other, by = written.setdefault(name.strip().casefold(), (name, model))
            if other != name:
                return [
                    f"'{other}' of {by} and '{name}' of {model} are taken for two classes; if they are one, give them "
                    "one name in id2label"
                ]
    return []


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
