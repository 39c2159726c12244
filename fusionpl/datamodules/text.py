"""Masked language modelling: blocks of text, masked anew in training and once for evaluation."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from fusionpl.datamodules.base import IGNORED, Collate, FixedSplits, Run, as_it_is
from fusionpl.datamodules.corpora import blocks_of, corpus
from fusionpl.errors import FusionError
from fusionpl.models import load_tokenizer, train_wordpiece

MASK_SEED = 0
SHUFFLE_BUFFER = 10_000


@dataclass(frozen=True)
class TextConfig:
    """Which text, and how it is served.

    Args:
        path: `pydoc` (the Python Language Reference, which every Python carries), a hub id, or a local folder of
            parquet or text files.
        name: a configuration of the hub's data set, such as `wikitext-2-raw-v1`.
        text_column: the column of text; null for the one called text, or the only one of strings.
        streaming: read training text as it goes, for corpora larger than memory; needs `trainer.limit_train_batches`.
        tokenizer: a model folder or hub id to take it from; null trains a WordPiece tokenizer on the training text.
        vocab_size: entries of a tokenizer that is trained, at most.
        block_size: tokens a block, [CLS] and [SEP] among them.
        mask_probability: share of the tokens to predict; 80 % of these are masked, 10 % replaced, 10 % kept.
        batch_size: blocks a step and process.
        train_limit: train on at most this many blocks; null for all.
        num_workers: processes that fetch training batches; 0 fetches in the main one.
    """

    path: str = "pydoc"
    name: str | None = None
    text_column: str | None = None
    streaming: bool = False
    tokenizer: str | None = None
    vocab_size: int = 2000
    block_size: int = 64
    mask_probability: float = 0.15
    batch_size: int = 32
    train_limit: int | None = None
    num_workers: int = 0


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


class MaskedTextDataModule(FixedSplits):
    """Train, validation, calibration and test blocks; documents are in one part only, and no seed changes which.

    Training masks come from torch's global RNG, so every epoch has others. Validation, calibration and test have masks
    that never change: calibration too, since statistics should see what the network sees in training.

    Args:
        config: which text, and how it is served.
        seed: decides, with the epoch, the order of the training blocks.
        tokenizer: of the model that is finetuned or fused; None takes or trains the one that `config` says.
    """

    evaluation_batch = 64
    reads = "input_ids"
    metrics = ("accuracy", "perplexity")

    def __init__(self, config: TextConfig, seed: int = 0, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        super().__init__(seed)
        self.config = config
        self._tokenizer = tokenizer
        self._sets: dict[str, Blocks] = {}

    @property
    def num_classes(self) -> int:
        """Entries of the vocabulary."""
        return len(self.tokenizer)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What turns text into tokens."""
        if self._tokenizer is not None:
            return self._tokenizer
        config = self.config
        if config.tokenizer is not None:
            found = load_tokenizer(config.tokenizer)
            if found is None:
                raise FusionError(f"{config.tokenizer} has no tokenizer.json; give --data.tokenizer another folder")
            return found
        texts = self._documents["train"]
        if config.streaming:
            texts = texts.take(SHUFFLE_BUFFER)
        return train_wordpiece((row["text"] for row in texts), config.vocab_size)

    def model_args(self) -> dict[str, Any]:
        """The vocabulary's size and the padding token."""
        return {"vocab_size": len(self.tokenizer), "pad_token_id": self.tokenizer.pad_token_id}

    def check_model(self, model: Any, run: Run | None = None) -> None:
        """Raises FusionError where blocks are longer than the model's positions; else see `FixedSplits`."""
        check_length(model, self.config.block_size, "data.block_size")
        super().check_model(model, run)

    def dataset(self, part: str) -> Blocks:
        """The blocks of a part, tokenised and cut on first use.

        Raises:
            FusionError: too little text for one block.
        """
        if part not in self._sets:
            size, limit = self.config.block_size, self.config.train_limit
            if size < 3:
                raise FusionError(f"data.block_size is {size}; a block is [CLS], text and [SEP], so at least 3 tokens")
            found = blocks_of(self._documents[part], self.tokenizer, size)
            if not len(found):
                raise FusionError(
                    f"the {part} part of '{self.config.path}' is too small for one block of {size} tokens; lower "
                    "--data.block_size or give more text"
                )
            ids = torch.from_numpy(np.asarray(found.with_format("numpy")["input_ids"], dtype=np.int64))
            self._sets[part] = Blocks(input_ids=ids[:limit]) if part == "train" else Blocks(**self._masked_once(ids))
        return self._sets[part]

    def describe(self) -> str:
        """Number and length of training blocks."""
        count = "streamed" if self.config.streaming else f"{len(self.dataset('train')):,}"
        return f"{count} blocks of {self.config.block_size} tokens"

    def collate(self, part: str) -> Collate:
        """Masks training batches; the others are masked already."""
        return self._masked if part == "train" else as_it_is

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in an order that (seed, epoch) decides; streamed text is shuffled in a buffer."""
        if not self.config.streaming:
            return super().train_dataloader()
        from datasets.distributed import split_dataset_by_node

        rank, world = self._ranks[1], self._ranks[0]
        stream = blocks_of(self._documents["train"], self.tokenizer, self.config.block_size)
        stream = split_dataset_by_node(stream.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER), rank, world)
        return DataLoader(stream, batch_size=self.config.batch_size, collate_fn=self._masked_rows, drop_last=True)

    def baseline(self) -> dict[str, float]:
        """The loss in nats of predicting every masked token of the test part by its frequency in the training blocks.

        What a model must beat to have learned anything from context. Counts start at one.
        """
        sample = self.dataset("calibration" if self.config.streaming else "train").tensors["input_ids"]
        counts = torch.bincount(sample[:, 1:-1].flatten(), minlength=len(self.tokenizer)).double() + 1
        labels = self.dataset("test").tensors["labels"]
        return {"unigram_loss": float(-(counts / counts.sum()).log()[labels[labels != IGNORED]].mean())}

    @cached_property
    def _documents(self) -> dict[str, Any]:
        config = self.config
        return corpus(config.path, config.name, config.text_column, streaming=config.streaming)

    @cached_property
    def _collator(self) -> DataCollatorForLanguageModeling:
        return DataCollatorForLanguageModeling(self.tokenizer, mlm_probability=self.config.mask_probability)

    def _masked(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        ids = batch["input_ids"]
        special = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids))
        masked, labels = self._collator.torch_mask_tokens(ids.clone(), special_tokens_mask=special)
        return {**batch, "input_ids": masked, "labels": labels}

    def _masked_rows(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        return self._masked({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def _masked_once(self, ids: Tensor) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(MASK_SEED)
            return self._masked({"input_ids": ids})


def check_length(model: Any, length: int, key: str) -> None:
    """Raises FusionError where sequences of `length` tokens have no positions in `model`."""
    config = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    # RoBERTa's first position comes after the padding's
    offset = 2 if getattr(config, "model_type", None) == "roberta" else 0
    if positions is not None and length > positions - offset:
        raise FusionError(f"{key} is {length}, but the model has {positions - offset} positions; lower {key}")
