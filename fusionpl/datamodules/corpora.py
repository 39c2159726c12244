"""Where text comes from, and how it becomes blocks of tokens: pydoc, a hub id, a file, a folder of files."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

import numpy as np

from fusionpl.datamodules.sources import load
from fusionpl.datamodules.splits import tell
from fusionpl.errors import FusionError

SPLIT_SEED = 0
# Parts that a corpus has not are taken from its training text: shares of its characters.
SHARES = {"test": 0.1, "validation": 0.05, "calibration": 0.05}
# A twentieth of a small text has too few tokens for statistics, and nobody trains much on it.
SMALL, SMALL_CALIBRATION = 200_000, 0.2  # characters, share
# The same of a streamed corpus, whose size is not known: documents from its start.
STREAMED_DOCUMENTS = 1000

Documents = Any  # datasets.Dataset or, streamed, datasets.IterableDataset, with one column "text"


def corpus(path: str, name: str | None, column: str | None, *, streaming: bool) -> dict[str, Documents]:
    """The documents of train, validation, calibration and test; none is in two of them.

    Args:
        path: `pydoc` (the language reference that comes with Python), a hub id, a data file, or a folder of them.
            A line of a text file is a document.
        name: a configuration of the hub's data set.
        column: the text column; None for the one called text, or the only one of strings.
        streaming: read the training text as it goes.

    Raises:
        FusionError: no such data set or column, or no text.
    """
    import datasets

    datasets.disable_progress_bars()
    if path == "pydoc":
        return _carved(path, {"train": _pydoc()})
    splits = load(path, name, streaming=streaming)
    texts = {split: _texts(path, rows, column) for split, rows in splits.items()}
    return _streamed(texts) if streaming else _carved(path, texts)


@dataclass(frozen=True)
class Frame:
    """How the tokens of joined documents are cut into blocks.

    Args:
        inner: tokens of text in a block.
        first, last: special tokens before and behind them.
        shared: how many tokens of text a block has in common with the next one.
        lines: a document that does not end a line is made to, since the next one follows it.
    """

    inner: int
    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    shared: int = 0
    lines: bool = False


def blocks_of(documents: Documents, tokenizer: Any, frame: Frame, *, count_bytes: bool = False) -> Documents:
    """Tokenises documents and cuts their concatenation into blocks: a column `input_ids`; the rest is dropped.

    `datasets` caches the result for text that it read from disk.

    Args:
        documents: with a column `text`.
        tokenizer: of transformers; it must know where in the text its tokens are (`is_fast`) if bytes are counted.
        frame: how blocks are cut.
        count_bytes: adds a column `bytes`, the length in UTF-8 of the text of a block behind the tokens that it shares
            with the one before. What a tokenizer leaves out, such as spaces, counts for the token that follows.
    """
    step = frame.inner - frame.shared

    def cut(batch: Mapping[str, list[str]]) -> dict[str, list[Any]]:
        texts = [text or "" for text in batch["text"]]  # an empty cell of a table holds none
        texts = [f"{text}\n" if frame.lines and text and not text.endswith("\n") else text for text in texts]
        encoding = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False,
            return_offsets_mapping=count_bytes,
        )  # fmt: skip
        tokens = [token for document in encoding["input_ids"] for token in document]
        starts = range(0, len(tokens) - frame.inner + 1, step)
        ids = [[*frame.first, *tokens[start : start + frame.inner], *frame.last] for start in starts]
        if not count_bytes:
            return {"input_ids": ids}
        ends = [0, *_ends(texts, encoding["offset_mapping"])]
        return {"input_ids": ids, "bytes": [ends[at + frame.inner] - ends[at + frame.shared] for at in starts]}

    return documents.map(cut, batched=True, batch_size=1000, remove_columns=["text"])


def _ends(texts: list[str], offsets: list[list[tuple[int, int]]]) -> Iterable[int]:
    """For every token, how many bytes of the joined texts lie before its end."""
    before = 0
    for text, spans in zip(texts, offsets, strict=True):
        until = list(accumulate((len(letter.encode("utf-8", "surrogatepass")) for letter in text), initial=0))
        ends = list(accumulate((end for _, end in spans), max))
        yield from (before + until[end] for end in ends[:-1])
        before += until[-1]
        if ends:  # the last one has what is behind it
            yield before


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


def _carved(path: str, splits: Mapping[str, Documents]) -> dict[str, Documents]:
    parts = {split: rows for split, rows in splits.items() if split in ("validation", "test")}
    # Some corpora come without training text: then it is what they have to validate or test with.
    source = next((split for split in ("train", "validation", "test") if split in splits), None)
    if source is None:
        raise FusionError(f"the corpus has neither a train nor a validation split; it has {', '.join(splits)}")
    parts.pop(source, None)
    if source == "test":
        tell(f"{path}: no train split; test is used as one")
    rest = splits[source]
    total = sum(len(text or "") for text in rest["text"])
    if not any((text or "").strip() for text in rest["text"]):
        raise FusionError(f"'{path}' holds no text; name another with --data.path, or its column with "
                          "--data.text_column")  # fmt: skip
    shares = {part: share for part, share in SHARES.items() if part not in parts}
    if total < SMALL:
        shares["calibration"] = SMALL_CALIBRATION
        tell(f"{path}: {total:,} characters are little text; a fifth of them is for calibration")
    return {**parts, **(_by_document(rest, shares) or _by_word(rest, shares))}


def _by_document(rest: Documents, shares: Mapping[str, float]) -> dict[str, Documents] | None:
    """Shares of the text from its end, in whole documents, and what is left to train on; None where documents don't
    suffice."""
    parts = {}
    for part, share in shares.items():
        lengths = np.cumsum([len(text or "") for text in rest["text"]][::-1])
        total = int(lengths[-1])
        count = int(np.searchsorted(lengths, share * total)) + 1
        if not total or count >= len(rest):
            return None
        parts[part] = rest.select(range(len(rest) - count, len(rest)))
        rest = rest.select(range(len(rest) - count))
    return {"train": rest, **parts}


def _by_word(rest: Documents, shares: Mapping[str, float]) -> dict[str, Documents]:
    """The same for few documents: shares of their joined text, cut between words where it has any."""
    import datasets

    text = "\n".join(text or "" for text in rest["text"])
    parts = {}
    for part, share in shares.items():
        at = int(len(text) * (1 - share))
        at = max(text.rfind(" ", 0, at), text.rfind("\n", 0, at)) + 1 or at
        text, parts[part] = text[:at], text[at:]
    return {part: datasets.Dataset.from_dict({"text": [words]}) for part, words in {"train": text, **parts}.items()}


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
    return [row["text"] or "" for row in islice(rows, count)]
