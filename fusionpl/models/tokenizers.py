"""Tokenizers: trained once on a corpus, kept with the model, compared between parents."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import tokenizers
import transformers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fusionpl.errors import FusionError
from fusionpl.models.load import model_folder

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
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=list(SPECIAL.values()), min_frequency=2, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    numbers = {token: index for index, token in enumerate(SPECIAL.values())}
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", numbers["[SEP]"]), ("[CLS]", numbers["[CLS]"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model; None where there is none.

    Args:
        source: a run folder, a model folder, or a hub id.

    Raises:
        FusionError: its files are damaged.
    """
    folder = model_folder(str(source))
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json")):
        return None
    try:
        found: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a broken file raises whatever its parser does
        raise FusionError(f"{folder}: the tokenizer can't be read ({error}); copy or train the model again") from error
    return found


def check_tokenizers(found: Mapping[str, PreTrainedTokenizerBase | None]) -> None:
    """Checks that parents (name -> tokenizer) read text alike.

    Raises:
        FusionError: naming both parents and the first difference.
    """
    (first, reference), *others = found.items()
    for name, other in others:
        difference = _difference(reference, other)
        if difference:
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
    return None
