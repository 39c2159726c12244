"""Tokenizers: trained once on a corpus, kept with the model, compared between parents."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fusionpl.errors import FusionError, reason
from fusionpl.models.adapters import is_adapter
from fusionpl.models.folders import base_folder, model_folder

ALPHABET = 1000  # letters, the most frequent ones, as in BERT
# Text that tokenizers with the same tokens may cut differently: by case, accents, digits, spaces, marks, other scripts.
PROBES = (
    "The Quick brown FOX", "Café naïve Ångström", "in 1999, 3.14 % of $1,000", "  two  spaces\tand a tab\n",
    "don't we'll", "well-known e-mail@host.org", "中文 字", "Ａ ﬁ ½", "a", " a", "",
)  # fmt: skip
SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}


def train_wordpiece(texts: Iterable[str], size: int) -> PreTrainedTokenizerBase:
    """A lower-casing WordPiece tokenizer as BERT's; the same texts give the same one.

    Args:
        texts: training text.
        size: entries of the vocabulary, special tokens among them, at most.

    Raises:
        FusionError: no text.
    """
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise FusionError("the training text is empty, so there is nothing to train a tokenizer on")
    tokenizer = _untrained(models.WordPiece(unk_token=SPECIAL["unk_token"]))
    letters = Counter(
        letter
        for text in texts
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
        for letter in word
    )
    alphabet = sorted(sorted(letters, key=lambda letter: (-letters[letter], letter))[:ALPHABET])
    # The trainer numbers letters inside words in the order of a hash table, another one in every process, and breaks
    # ties by number. What is named in advance has a fixed number; the tokenizer itself is made anew below.
    named = [*SPECIAL.values(), *(f"##{letter}" for letter in alphabet)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=named, initial_alphabet=alphabet, limit_alphabet=len(alphabet), min_frequency=2,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) > size:
        raise FusionError(
            f"data.vocab_size {size} is too small: the training text has {len(alphabet)} letters, so it needs at least "
            f"{len(vocabulary)} entries"
        )
    found = _untrained(models.WordPiece(vocab=vocabulary, unk_token=SPECIAL["unk_token"]))
    found.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return PreTrainedTokenizerFast(tokenizer_object=found, **SPECIAL)


def train_bpe(
    texts: Iterable[str], size: int, special: Mapping[str, str], more: Sequence[str] = ()
) -> PreTrainedTokenizerBase:
    """A byte-pair encoding of bytes as GPT-2's: nothing is unknown to it. The same texts give the same one.

    Args:
        texts: training text.
        size: entries of the vocabulary, special tokens among them, at most.
        special: names of special tokens, `eos_token` and such.
        more: further special tokens, behind those.

    Raises:
        FusionError: no text, or `size` is less than all bytes and special tokens.
    """
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise FusionError("the training text is empty, so there is nothing to train a tokenizer on")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    named = [*dict.fromkeys(special.values()), *more]
    if size < len(named) + len(alphabet):
        raise FusionError(
            f"data.vocab_size {size} is too small: bytes and special tokens need {len(named) + len(alphabet)} entries"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=named, initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=list(more), **special)


def _untrained(model: models.WordPiece) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model, for an adapter without one its base's; None where there is none.

    Args:
        source: a run folder, a model folder, or a hub id (`org/name@revision`), of which no weights are downloaded.

    Raises:
        FusionError: its files are damaged.
    """
    folder = model_folder(str(source), weights=False)
    if not _has_tokenizer(folder) and is_adapter(folder):
        folder = base_folder(folder, weights=False)
    if not _has_tokenizer(folder):
        return None
    try:
        found: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a broken file raises whatever its parser does
        raise FusionError(
            f"{folder}: the tokenizer can't be read ({reason(error)}); copy or train the model again"
        ) from error
    return found


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json"))


def check_tokenizers(found: Mapping[str, PreTrainedTokenizerBase | None], *, renumbered: bool = True) -> None:
    """Checks that parents (name -> tokenizer) read text alike.

    Args:
        found: their tokenizers.
        renumbered: whether they may number the same tokens differently, and have added tokens of their own.

    Raises:
        FusionError: naming both parents and the first difference.
    """
    (first, reference), *others = found.items()
    for name, other in others:
        difference = _difference(reference, other)
        if difference and not (renumbered and reference and other and _renumbered(reference, other)):
            raise FusionError(
                f"parents with different tokenizers: {difference.format(first, name)}; train both with one tokenizer "
                "(--data.tokenizer)"
            )


def _difference(a: PreTrainedTokenizerBase | None, b: PreTrainedTokenizerBase | None) -> str | None:
    if a is None or b is None:
        return None if a is b else ("{0} has one, {1} has none" if b is None else "{1} has one, {0} has none")
    if len(a) != len(b):
        return f"{{0}} has {len(a)} tokens, {{1}} has {len(b)}"
    for index, (ours, theirs) in enumerate(
        zip(*(one.convert_ids_to_tokens(list(range(len(one)))) for one in (a, b)), strict=True)
    ):
        if ours != theirs:
            ours, theirs = (token.replace("{", "{{").replace("}", "}}") for token in (ours, theirs))
            return f"token {index} is '{ours}' in {{0}} and '{theirs}' in {{1}}"
    if a.special_tokens_map != b.special_tokens_map:
        return "{0} and {1} name their special tokens differently"
    for text in PROBES:
        ours, theirs = (" ".join(one.convert_ids_to_tokens(one(text)["input_ids"])) for one in (a, b))
        if ours != theirs:
            text, ours, theirs = (one.replace("{", "{{").replace("}", "}}") for one in (text, ours, theirs))
            return f"{{0}} cuts '{text}' into '{ours}', {{1}} into '{theirs}'"
    return None


def _renumbered(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers cut text alike, into tokens that are numbered differently or were added to one of them."""
    if not (isinstance(a, PreTrainedTokenizerFast) and isinstance(b, PreTrainedTokenizerFast)):
        return False
    (ours, added), (theirs, others) = _cutting(a), _cutting(b)
    return (
        ours == theirs
        and all(added[name] == others[name] for name in added.keys() & others.keys())
        and a.special_tokens_map == b.special_tokens_map
        and a.pad_token_id == b.pad_token_id  # positions may be counted from it
    )


def _cutting(tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a tokenizer does to text, with its tokens but without their numbers; and its added tokens."""
    found = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["content"]: {**token, "id": None} for token in found["added_tokens"]}
    model, entries = found["model"], found["model"]["vocab"]
    if isinstance(entries, dict):
        tokens: list[Any] = sorted(entries.keys() - added.keys())
    else:  # Unigram: pieces with their scores
        tokens = sorted(entry for entry in entries if entry[0] not in added)
        model = {**model, "unk_id": None if model["unk_id"] is None else entries[model["unk_id"]][0]}
    steps = {step: found[step] for step in ("normalizer", "pre_tokenizer", "decoder")}
    steps |= {"post_processor": _without_numbers(found["post_processor"]), "model": {**model, "vocab": tokens}}
    return steps, added


def _without_numbers(part: Any) -> Any:
    """A post-processor without the numbers of the tokens that it puts in."""
    if isinstance(part, dict):
        return {key: _without_numbers(value) for key, value in part.items() if key != "ids"}
    if isinstance(part, list):
        return [_without_numbers(value) for value in part if not isinstance(value, int)]
    return part
