"""Whether parents read text alike: the numbers of their tokens, the steps of their tokenizers, and what these cut."""

import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fusionpl.errors import FusionError

# Text that tokenizers with the same tokens may cut differently: by case, accents, digits, spaces, marks, other scripts.
PROBES = (
    "The Quick brown FOX", "Café naïve Ångström", "in 1999, 3.14 % of $1,000", "  two  spaces\tand a tab\n",
    "don't we'll", "well-known e-mail@host.org", "中文 字", "Ａ ﬁ ½", "a", " a", "",
)  # fmt: skip
LINES = 400  # of the calibration data, at most
# Of the vocabulary, at most: a token that other merges or scores don't lead to is cut otherwise itself.
TOKENS, ADDED = 5000, 50
IN_PYTHON = "are written in Python, whose steps can't be compared"
SIDES = ("padding_side", "truncation_side")
SHOWN = 8  # tokens behind the first that differs

Tokenizer = PreTrainedTokenizerBase


def check_tokenizers(
    found: Mapping[str, Tokenizer | None], *, renumbered: bool = True, texts: Iterable[str] = ()
) -> list[str]:
    """Checks that parents (name -> tokenizer) read text alike.

    Where their steps are not the same, text decides: probes, the tokens themselves, and what is given.

    Args:
        found: their tokenizers.
        renumbered: whether they may number the same tokens differently, and have added tokens of their own.
        texts: of the data; read where they may decide.

    Returns:
        What a reader should know of tokenizers that are not the same and cut text alike, a line each.

    Raises:
        FusionError: naming both parents and the first difference.
    """
    (first, reference), *others = found.items()
    lines, given = [], list[str]()
    for name, other in others:
        if reference is None or other is None:
            if reference is not other:
                has, lacks = (first, name) if other is None else (name, first)
                raise FusionError(
                    f"parents with different tokenizers: {has} has one, {lacks} has none; copy it beside the other if "
                    "that was trained with it"
                )
            continue
        difference = _numbers(reference, other)
        if difference is None:
            part = unlike_part(reference, other)
            given = given or (list(islice(texts, LINES)) if part else [])
            probes = [*PROBES, *(_telling(reference, other) if part else ()), *given]
            difference = _cuts(reference, other, probes)
            if difference is None and part:
                what = part if part == IN_PYTHON else f"differ in the {part}"
                lines.append(
                    f"{first} and {name}: their tokenizers {what}, and cut {len(probes):,} texts alike; text is read "
                    f"as {first}'s does"
                )
            elif difference and part:
                difference = f"{difference} (they {part if part == IN_PYTHON else f'differ in the {part}'})"
        elif renumbered and _renumbered(reference, other):
            difference = None
        if difference:
            raise FusionError(
                f"parents with different tokenizers: {difference.format(first, name)}; train both with one tokenizer "
                "(--data.tokenizer)"
            )
        lines += _summary(reference, other, (first, name))
    return lines


def _numbers(a: Tokenizer, b: Tokenizer) -> str | None:
    """The first difference of two vocabularies, number by number, or of the names of special tokens."""
    if len(a) != len(b):
        return f"{{0}} has {len(a)} tokens, {{1}} has {len(b)}"
    for index, (ours, theirs) in enumerate(
        zip(*(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) for tokenizer in (a, b)), strict=True)
    ):
        if ours != theirs:
            return f"token {index} is '{_plain(ours)}' in {{0}} and '{_plain(theirs)}' in {{1}}"
    return _special(a, b)


def _special(a: Tokenizer, b: Tokenizer) -> str | None:
    """The first special token that differs. One tokenizer may lack that for padding: models say what theirs is."""
    ours, theirs = a.special_tokens_map, b.special_tokens_map
    for key in {**ours, **theirs}:
        pair = ours.get(key), theirs.get(key)
        if pair[0] != pair[1] and not (key == "pad_token" and None in pair):
            return f"the {key} is '{_plain(pair[0])}' in {{0}} and '{_plain(pair[1])}' in {{1}}"
    return None


def _plain(text: Any) -> str:
    """Text that `str.format` leaves as it is."""
    return str(text).replace("{", "{{").replace("}", "}}")


def unlike_part(a: Tokenizer, b: Tokenizer) -> str | None:
    """The first step in which two tokenizers with the same numbers differ by their files; None where none does.

    Of tokenizers that are written in Python the files tell too little.
    """
    if not (isinstance(a, PreTrainedTokenizerFast) and isinstance(b, PreTrainedTokenizerFast)):
        return IN_PYTHON
    if a.backend_tokenizer.to_str() == b.backend_tokenizer.to_str():
        return None
    (ours, added), (theirs, others) = steps_of(a), steps_of(b)
    part = next((step for step in ours if ours[step] != theirs[step]), None)
    token = next((token for token in added if added[token] != others.get(token)), None)
    return part or (token and f"added token '{token}'")


def _telling(a: Tokenizer, b: Tokenizer) -> Iterator[str]:
    """Text in which other steps show: added tokens between words, and tokens by themselves and behind a space."""
    special = sorted(set(a.get_added_vocab()) | set(b.get_added_vocab()))[:ADDED]
    for token in special:
        yield from (f"a {token} b", f"a{token}b", f"a {token.lower()} B")
    step = -(-len(a) // TOKENS)
    for index in range(0, len(a), step):
        if (token := a.convert_ids_to_tokens(index)) is not None:
            text = a.convert_tokens_to_string([str(token)])
            yield from (text, f" {text}")


def _cuts(a: Tokenizer, b: Tokenizer, texts: Sequence[str]) -> str | None:
    """The first text, or pair of texts, that two tokenizers with the same numbers cut differently."""
    for text, ours, theirs in zip(
        texts, *(tokenizer(list(texts), verbose=False)["input_ids"] for tokenizer in (a, b)), strict=True
    ):
        if ours != theirs:
            at = next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
            start = max((min(len(ours), len(theirs)) if at is None else at) - 1, 0)
            cut = (_plain(" ".join(tokenizer.convert_ids_to_tokens(ids[start : start + SHOWN])))
                   for tokenizer, ids in ((a, ours), (b, theirs)))  # fmt: skip
            return "{{0}} cuts '{}' into '{}', {{1}} into '{}'".format(
                _plain(textwrap.shorten(text, 60, placeholder=" ...") if len(text) > 60 else text), *cut
            )
    pairs = [" ".join(tokenizer.convert_ids_to_tokens(tokenizer("a", "b")["input_ids"])) for tokenizer in (a, b)]
    return (
        None
        if pairs[0] == pairs[1]
        else f"{{0}} joins 'a' and 'b' to '{_plain(pairs[0])}', {{1}} to '{_plain(pairs[1])}'"
    )


def _summary(a: Tokenizer, b: Tokenizer, names: tuple[str, str]) -> list[str]:
    """What tokenizers that cut text alike do differently, a line each."""
    first, name = names
    lines = [
        f"{side} is {getattr(a, side)} in the tokenizer of {first}, {getattr(b, side)} in that of {name}: text is read "
        f"as {first}'s does"
        for side in SIDES
        if getattr(a, side) != getattr(b, side)
    ]
    marked = [any(tokenizer("a", "b").get("token_type_ids") or ()) for tokenizer in (a, b)]
    if marked[0] != marked[1]:
        does, leaves = names if marked[0] else names[::-1]
        lines.append(f"the tokenizer of {does} marks the second of two texts (token_type_ids), that of {leaves} does "
                     f"not: text is read as {first}'s does")  # fmt: skip
    return lines


def _renumbered(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two tokenizers cut text alike, into tokens that are numbered differently or were added to one of them."""
    if not (isinstance(a, PreTrainedTokenizerFast) and isinstance(b, PreTrainedTokenizerFast)):
        return False
    (ours, added), (theirs, others) = steps_of(a), steps_of(b)
    return (
        ours == theirs
        and all(added[name] == others[name] for name in added.keys() & others.keys())
        and a.special_tokens_map == b.special_tokens_map
        and a.pad_token_id == b.pad_token_id  # positions may be counted from it
    )


def steps_of(tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a tokenizer does to text, with its tokens but without their numbers; and its added tokens."""
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["content"]: {**token, "id": None} for token in pipeline["added_tokens"]}
    model, entries = pipeline["model"], pipeline["model"]["vocab"]
    if isinstance(entries, dict):
        tokens: list[Any] = sorted(entries.keys() - added.keys())
    else:  # Unigram: pieces with their scores
        tokens = sorted(entry for entry in entries if entry[0] not in added)
        model = {**model, "unk_id": None if model["unk_id"] is None else entries[model["unk_id"]][0]}
    steps = {step: pipeline[step] for step in ("normalizer", "pre_tokenizer", "decoder")}
    steps |= {"post_processor": _without_numbers(pipeline["post_processor"]), "model": {**model, "vocab": tokens}}
    return steps, added


def _without_numbers(part: Any) -> Any:
    """A post-processor without the numbers of the tokens that it puts in."""
    if isinstance(part, dict):
        return {key: _without_numbers(value) for key, value in part.items() if key != "ids"}
    if isinstance(part, list):
        return [_without_numbers(value) for value in part if not isinstance(value, int)]
    return part
