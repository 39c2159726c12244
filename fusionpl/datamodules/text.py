"""Language modelling: blocks of text, and examples of them, drawn anew in training and once for evaluation."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from fusionpl.calibration.forward import eval_mode, logits
from fusionpl.datamodules.base import IGNORED, Collate, FixedSplits, Run, as_it_is
from fusionpl.datamodules.config import TextConfig
from fusionpl.datamodules.corpora import blocks_of, corpus
from fusionpl.datamodules.objectives import MaskedTokens, NextTokens, Objective, Spans
from fusionpl.datamodules.splits import tell
from fusionpl.errors import FusionError
from fusionpl.models.tokenizers import load_tokenizer

EXAMPLE_SEED = 0
SHUFFLE_BUFFER = 10_000
PROMPT = 32
BEGINNING = 2000  # letters of a document that show how it is cut
LOOKS_AHEAD = 1e-4


class Blocks(Dataset[dict[str, Tensor]]):
    """Blocks of tokens held as tensors; a batch is one indexing, not a loop.

    Args:
        tensors: of one length: input_ids int64 [N, T], and labels where they are fixed.
    """

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """The batch `{"input_ids": [B, T], "attention_mask": [B, T], ...}`."""
        batch = {key: value[indices] for key, value in self.tensors.items()}
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


class TextDataModule(FixedSplits):
    """Train, validation, calibration and test blocks; documents are in one part only, and no seed changes which.

    Training examples that are drawn come from torch's global RNG, so every epoch has others. Those of validation,
    calibration and test never change: calibration too, since statistics should see what the network sees in training.

    Args:
        config: which text, and how it is served.
        seed: decides, with the epoch, the order of the training blocks.
        tokenizer: of the model that is finetuned or fused; None takes or trains the one that `config` says.

    Attributes:
        learns: how examples are made of blocks.
    """

    evaluation_batch = 64
    reads = "input_ids"
    metrics = ("accuracy", "perplexity")
    learns: type[Objective]

    def __init__(self, config: TextConfig, seed: int = 0, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        super().__init__(seed)
        self.config = config
        self._tokenizer = tokenizer
        self._sets: dict[str, Blocks] = {}
        self._bytes: dict[str, int] = {}

    @property
    def num_classes(self) -> int:
        """Entries of the vocabulary."""
        return len(self.tokenizer)

    def fits(self, outputs: int) -> bool:
        """Whether a model has an output for each token; published ones are padded to a round number with more."""
        return outputs >= self.num_classes

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What turns text into tokens."""
        if self._tokenizer is not None:
            return self._tokenizer
        config = self.config
        if config.tokenizer is not None:
            tokenizer = load_tokenizer(config.tokenizer)
            if tokenizer is None:
                raise FusionError(f"{config.tokenizer} has no tokenizer.json; give --data.tokenizer another folder")
            return tokenizer
        texts = self._documents["train"]
        if config.streaming:
            texts = texts.take(SHUFFLE_BUFFER)
        return self.learns.train_tokenizer((row["text"] for row in texts), config)

    @cached_property
    def objective(self) -> Objective:
        """How examples are made of this tokenizer's blocks."""
        return self.learns(self.tokenizer, self.config)

    def model_args(self) -> dict[str, Any]:
        """The vocabulary's size and the special tokens."""
        return self.objective.model_args()

    def check_model(self, model: Any, run: Run | None = None) -> None:
        """Raises FusionError where blocks are longer than the model's positions; else see `FixedSplits`."""
        check_length(model, self.config.block_size, "data.block_size")
        rows = getattr(getattr(model, "config", None), "vocab_size", None)
        if rows is not None and not self.fits(rows):
            raise FusionError(
                f"the {type(model).__name__} has rows for {rows} tokens, fewer than the {self.num_classes} of its "
                "tokenizer; give --data.tokenizer the one that it was trained with"
            )
        super().check_model(model, run)

    def dataset(self, part: str) -> Blocks:
        """The blocks of a part, tokenised and cut on first use.

        Of very little text validation and test may be empty, and calibration is then on all text that nothing is
        tested on.

        Raises:
            FusionError: too little text for one block to train or calibrate on.
        """
        if part not in self._sets:
            ids = self._cut(part)
            if not len(ids) and part == "calibration" and not self.config.streaming:
                ids = self._all_but_tested()
            if not len(ids) and part in ("train", "calibration"):
                raise FusionError(self._too_small(part))
            self._sets[part] = Blocks(input_ids=ids[: self.config.train_limit]) if part == "train" else self._once(ids)
        return self._sets[part]

    def _too_small(self, part: str) -> str:
        return (
            f"the {part} part of '{self.config.path}' is too small for one block of {self.config.block_size} "
            "tokens; lower --data.block_size or give more text"
        )

    def _cut(self, *parts: str) -> Tensor:
        """Blocks of the joined text of parts, int64 [N, T]."""
        from datasets import concatenate_datasets

        objective = self.objective
        count_bytes = objective.whole and parts == ("test",) and self.tokenizer.is_fast
        documents = concatenate_datasets([self._documents[part] for part in parts])
        blocks = blocks_of(documents, self.tokenizer, objective.frame, count_bytes=count_bytes)
        if not len(blocks):
            return torch.empty(0, self.config.block_size, dtype=torch.long)
        columns = blocks.with_format("numpy")
        if count_bytes:
            self._bytes["test"] = int(np.sum(columns["bytes"]))
        return torch.from_numpy(np.asarray(columns["input_ids"], dtype=np.int64))

    def _all_but_tested(self) -> Tensor:
        """Blocks to calibrate on where the part for that has none: the training text, and parts that have none."""
        spare = [part for part in ("validation", "test") if not len(self.dataset(part))]
        ids = self._cut("train", "calibration", *spare)
        if len(ids):
            path = self.config.path
            tell(f"{path}: little text; all that nothing is tested on, {len(ids):,} blocks, is for calibration")
        return ids

    def describe(self) -> str:
        """Number and length of training blocks."""
        count = "streamed" if self.config.streaming else f"{len(self.dataset('train')):,}"
        return f"{count} blocks of {self.config.block_size} tokens"

    def collate(self, part: str) -> Collate:
        """Makes examples of training blocks; the others are made already."""
        return self._examples if part == "train" else as_it_is

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in an order that (seed, epoch) decides; streamed text is shuffled in a buffer.

        Raises:
            FusionError: too little text for one block to validate or test on.
        """
        for part in ("validation", "test"):
            if not len(self.dataset(part)):
                raise FusionError(self._too_small(part))
        if not self.config.streaming:
            return super().train_dataloader()
        from datasets.distributed import split_dataset_by_node

        rank, world = self._ranks[1], self._ranks[0]
        stream = blocks_of(self._documents["train"], self.tokenizer, self.objective.frame)
        stream = split_dataset_by_node(stream.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER), rank, world)
        return DataLoader(stream, batch_size=self.config.batch_size, collate_fn=self._rows, drop_last=True)

    def unlabelled_dataloader(self) -> DataLoader[Any] | None:
        """Blocks of the training text; None where it is streamed, or all of it is for calibration."""
        try:
            return None if self.config.streaming else super().unlabelled_dataloader()
        except FusionError:  # too little for a block
            return None

    def baseline(self) -> dict[str, float]:
        """The loss in nats of predicting every scored token of the test part by its frequency in the training blocks.

        What a model must beat to have learned anything from context. Counts start at one.
        """
        if self.config.streaming:
            blocks = blocks_of(self._documents["calibration"], self.tokenizer, self.objective.frame)
            sample = torch.tensor(blocks["input_ids"][:])
        else:
            sample = self.dataset("train").tensors["input_ids"]
        with _fixed_draw():
            tokens = self.objective.candidates(sample)
        counts = torch.bincount(tokens, minlength=len(self.tokenizer)).double() + 1
        labels = self.dataset("test").tensors["labels"]
        return {"unigram_loss": float(-(counts / counts.sum()).log()[labels[labels != IGNORED]].mean())}

    def texts(self) -> Iterator[str]:
        """The documents to calibrate on, from their beginnings."""
        return ((row["text"] or "")[:BEGINNING] for row in self._documents["calibration"])

    def derived(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Bits per byte, where every token of the test part is predicted once and its bytes are known.

        The negative log2-likelihood of the test blocks over the UTF-8 bytes of their text: it compares models whose
        tokenizers differ.
        """
        labels = self.dataset("test").tensors["labels"]
        if "test" not in self._bytes:
            return {}
        return {"bits_per_byte": figures["loss"] * labels.numel() / self._bytes["test"] / math.log(2)}

    @cached_property
    def _documents(self) -> dict[str, Any]:
        config = self.config
        return corpus(config.path, config.name, config.text_column, streaming=config.streaming)

    def _examples(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        made = self.objective.examples(batch["input_ids"])
        return made | {"attention_mask": torch.ones_like(made["input_ids"])}

    def _rows(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        return self._examples({"input_ids": torch.tensor([row["input_ids"] for row in rows])})

    def _once(self, ids: Tensor) -> Blocks:
        if not len(ids):
            return Blocks(input_ids=ids, labels=ids)
        with _fixed_draw():
            return Blocks(**self.objective.examples(ids))


class MaskedTextDataModule(TextDataModule):
    """Blocks in which some tokens are masked, as BERT learns."""

    learns = MaskedTokens


class CausalTextDataModule(TextDataModule):
    """Blocks of which every token is predicted from those before it, as GPT learns."""

    learns = NextTokens

    @property
    def prompt(self) -> Tensor:
        """The first tokens of the test part, for models to go on with."""
        return self.dataset("test").tensors["input_ids"][0, :PROMPT]

    def check_model(self, model: Any, run: Run | None = None) -> None:
        """Raises FusionError where the model sees the tokens that it should predict; else see `TextDataModule`."""
        super().check_model(model, run)
        run = run or (lambda batch: logits(model, batch))
        batch = self.sample()
        changed = batch["input_ids"].clone()
        changed[:, -1] = (changed[:, -1] + 1) % self.num_classes
        with torch.no_grad(), eval_mode(model):
            before, after = (run({**batch, "input_ids": ids})[:, :-1] for ids in (batch["input_ids"], changed))
        if ((before - after).abs() > LOOKS_AHEAD * before.abs().max()).any():
            raise FusionError(
                f"a {type(model).__name__} sees the tokens that it should predict; choose a model with a causal mask, "
                "or --task masked-lm"
            )


class SpanTextDataModule(TextDataModule):
    """Blocks that spans are cut out of, as T5 learns."""

    learns = Spans


@contextmanager
def _fixed_draw() -> Iterator[None]:
    """Draws are always the same, and the global RNG is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(EXAMPLE_SEED)
        yield


# Their first position comes after the padding's, and both are counted as positions.
_BEHIND_PADDING = {"roberta", "xlm-roberta", "camembert"}


def check_length(model: Any, length: int, key: str) -> None:
    """Raises FusionError where sequences of `length` tokens have no positions in `model`."""
    config = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    offset = 2 if getattr(config, "model_type", None) in _BEHIND_PADDING else 0
    if positions is not None and length > positions - offset:
        raise FusionError(f"{key} is {length}, but the model has {positions - offset} positions; lower {key}")
