"""Tokenizers: trained once on a corpus, kept with the model."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fusionpl.errors import FusionError, reason
from fusionpl.models.adapters import is_adapter
from fusionpl.models.folders import base_folder, model_folder

ALPHABET = 1000  # letters, the most frequent ones, as in BERT
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
    trained = _untrained(models.WordPiece(vocab=vocabulary, unk_token=SPECIAL["unk_token"]))
    trained.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return PreTrainedTokenizerFast(tokenizer_object=trained, **SPECIAL)


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
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a broken file raises whatever its parser does
        raise FusionError(
            f"{folder}: the tokenizer can't be read ({reason(error)}); copy or train the model again"
        ) from error
    return tokenizer


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json"))
