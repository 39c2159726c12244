"""Where text comes from, and how it becomes blocks of tokens: pydoc, a hub id, a local folder."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np

from fusionpl.datamodules.sources import load
from fusionpl.errors import FusionError

SPLIT_SEED = 0
# Parts that a corpus has not are taken from its training text: shares of its characters.
SHARES = {"test": 0.1, "validation": 0.05, "calibration": 0.05}
# The same of a streamed corpus, whose size is not known: documents from its start.
STREAMED_DOCUMENTS = 1000

Documents = Any  # datasets.Dataset or, streamed, datasets.IterableDataset, with one column "text"


def corpus(path: str, name: str | None, column: str | None, *, streaming: bool) -> dict[str, Documents]:
    """The documents of train, validation, calibration and test; none is in two of them.

    Args:
        path: `pydoc` (the language reference that comes with Python), a hub id, or a folder of parquet or text files.
        name: a configuration of the hub's data set.
        column: the text column; None for the one called text, or the only one of strings.
        streaming: read the training text as it goes.

    Raises:
        FusionError: no such data set or column, or no text.
    """
    import datasets

    datasets.disable_progress_bars()
    if path == "pydoc":
        return _carved({"train": _pydoc()})
    splits = load(path, name, streaming=streaming)
    texts = {split: _texts(path, rows, column) for split, rows in splits.items()}
    return _streamed(texts) if streaming else _carved(texts)


def blocks_of(documents: Documents, tokenizer: Any, size: int) -> Documents:
    """Tokenises documents and cuts their concatenation into blocks: a column `input_ids` of `size` tokens each.

    Each block is [CLS], size - 2 tokens of text, [SEP]; what is left at the end is dropped. `datasets` caches the
    result for text that it read from disk.
    """
    first, last, inner = tokenizer.cls_token_id, tokenizer.sep_token_id, size - 2

    def cut(batch: Mapping[str, list[str]]) -> dict[str, list[list[int]]]:
        found = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)
        tokens = [token for document in found["input_ids"] for token in document]
        starts = range(0, len(tokens) - inner + 1, inner)
        return {"input_ids": [[first, *tokens[start : start + inner], last] for start in starts]}

    return documents.map(cut, batched=True, batch_size=1000, remove_columns=["text"])


def _pydoc() -> Documents:
    from pydoc_data.topics import topics

    import datasets

    names = sorted(topics)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(names))
    return datasets.Dataset.from_dict({"text": [topics[names[index]] for index in order]})


def _texts(path: str, rows: Documents, column: str | None) -> Documents:
    features = rows.features or {}
    strings = [name for name, feature in features.items() if str(getattr(feature, "dtype", "")).endswith("string")]
    if column is None:
        column = "text" if "text" in features else strings[0] if len(strings) == 1 else None
    if column not in strings:
        asked = f"no text column '{column}'" if column else "no single text column"
        raise FusionError(
            f"the data set '{path}' has {asked}; its columns of text are {', '.join(strings) or 'none'}: "
            "name one with --data.text_column"
        )
    return rows.select_columns([column]).rename_columns({column: "text"} if column != "text" else {})


def _carved(splits: Mapping[str, Documents]) -> dict[str, Documents]:
    parts = {split: rows for split, rows in splits.items() if split in ("validation", "test")}
    # Some corpora come without training text: then it is what they have to validate with.
    rest = splits["train"] if "train" in splits else parts.pop("validation", None)
    if rest is None:
        raise FusionError(f"the corpus has neither a train nor a validation split; it has {', '.join(splits)}")
    for part, share in SHARES.items():
        if part not in parts:
            lengths = np.cumsum([len(text) for text in rest["text"]][::-1])
            total = int(lengths[-1]) if len(lengths) else 0
            count = int(np.searchsorted(lengths, share * total)) + 1
            if not total or count >= len(rest):
                raise FusionError(f"the corpus is too small: {len(rest)} documents can't be divided into "
                                  f"train, {', '.join(SHARES)}")  # fmt: skip
            parts[part] = rest.select(range(len(rest) - count, len(rest)))
            rest = rest.select(range(len(rest) - count))
    return {"train": rest, **parts}


def _streamed(splits: Mapping[str, Documents]) -> dict[str, Documents]:
    import datasets

    parts = {split: rows for split, rows in splits.items() if split in ("validation", "test")}
    if "train" not in splits:
        raise FusionError(f"a streamed corpus needs a train split; this one has {', '.join(splits)}")
    rest, used = splits["train"], 0
    for part in SHARES:
        source = parts.get(part)
        if source is None:
            source, used = rest.skip(used), used + STREAMED_DOCUMENTS
        parts[part] = datasets.Dataset.from_dict({"text": _first(source, STREAMED_DOCUMENTS)})
    return {"train": rest.skip(used), **parts}


def _first(rows: Iterable[Mapping[str, str]], count: int) -> list[str]:
    return [row["text"] for row in islice(rows, count)]
