"""What a language model learns from blocks of tokens: masked tokens, the next token, or spans that were cut out."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from fusionpl.datamodules.config import SpanTextConfig
from fusionpl.datamodules.corpora import Frame
from fusionpl.errors import FusionError
from fusionpl.models.tokenizers import train_bpe, train_wordpiece

SENTINEL = "<extra_id_{}>"  # T5's


class Objective(ABC):
    """How examples are made of blocks.

    Args:
        tokenizer: what made the tokens.
        config: the options of the data.

    Attributes:
        drawn: whether examples are drawn from torch's global RNG, and so are others in every epoch.
        whole: whether every token of the text is predicted once, so that the loss is that of the text.
        needs: the special tokens that it uses.

    Raises:
        FusionError: the tokenizer lacks a token that is used.
    """

    drawn = True
    whole = False
    needs: tuple[str, ...] = ()

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
        self.tokenizer, self.config = tokenizer, config
        for name in self.needs:
            if getattr(tokenizer, name) is None:
                raise FusionError(
                    f"the tokenizer has no {name}, which this task needs; give --data.tokenizer another, or --task "
                    "another task"
                )

    @staticmethod
    @abstractmethod
    def train_tokenizer(texts: Iterable[str], config: Any) -> PreTrainedTokenizerBase:
        """The tokenizer of models that learn this."""

    @property
    @abstractmethod
    def frame(self) -> Frame:
        """How blocks are cut."""

    @abstractmethod
    def examples(self, ids: Tensor) -> dict[str, Tensor]:
        """What the model reads, and `labels` [B, T'] beside its logits [B, T', tokens]; IGNORED is not scored.

        Args:
            ids: blocks, int64 [B, T].
        """

    @abstractmethod
    def candidates(self, ids: Tensor) -> Tensor:
        """All tokens of blocks [B, T] that may have to be predicted, int64 [n]."""

    def model_args(self) -> dict[str, Any]:
        """Arguments of the config of a model that learns this."""
        named = {f"{name}_id": getattr(self.tokenizer, f"{name}_id") for name in ("bos_token", "eos_token")}
        return {"vocab_size": len(self.tokenizer), "pad_token_id": self.tokenizer.pad_token_id, **named}


class MaskedTokens(Objective):
    """As BERT learns: some tokens are masked and predicted from both sides."""

    needs = ("cls_token", "sep_token", "mask_token")

    @staticmethod
    def train_tokenizer(texts: Iterable[str], config: Any) -> PreTrainedTokenizerBase:
        """A WordPiece tokenizer like BERT's."""
        return train_wordpiece(texts, config.vocab_size)

    @property
    def frame(self) -> Frame:
        """Blocks are [CLS], text, [SEP]."""
        return Frame(self.config.block_size - 2, (self.tokenizer.cls_token_id,), (self.tokenizer.sep_token_id,))

    def examples(self, ids: Tensor) -> dict[str, Tensor]:
        """The blocks with some tokens masked; the labels are those tokens."""
        special = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids))
        masked, labels = self._collator.torch_mask_tokens(ids.clone(), special_tokens_mask=special)
        return {"input_ids": masked, "labels": labels}

    def candidates(self, ids: Tensor) -> Tensor:
        """All tokens between [CLS] and [SEP]."""
        return ids[:, 1:-1].flatten()

    def model_args(self) -> dict[str, Any]:
        """The vocabulary's size and the padding token."""
        return {"vocab_size": len(self.tokenizer), "pad_token_id": self.tokenizer.pad_token_id}

    @cached_property
    def _collator(self) -> DataCollatorForLanguageModeling:
        return DataCollatorForLanguageModeling(self.tokenizer, mlm_probability=self.config.mask_probability)


class NextTokens(Objective):
    """As GPT learns: each token is predicted from those before it.

    A block has a token more than the model reads, which is the next block's first: so every token but the corpus' first
    is predicted once, and labels are shifted here and nowhere else.
    """

    drawn = False
    whole = True

    @staticmethod
    def train_tokenizer(texts: Iterable[str], config: Any) -> PreTrainedTokenizerBase:
        """A BPE tokenizer of bytes like GPT-2's, with its own token for padding."""
        special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|padding|>"}
        return train_bpe(texts, config.vocab_size, special)

    @property
    def frame(self) -> Frame:
        """Blocks are text alone, each one token longer than the model reads."""
        return Frame(self.config.block_size + 1, shared=1, lines=True)

    def examples(self, ids: Tensor) -> dict[str, Tensor]:
        """The blocks without their last token; the labels are the blocks without their first."""
        return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}

    def candidates(self, ids: Tensor) -> Tensor:
        """All tokens of a block but its first."""
        return ids[:, 1:].flatten()


class Spans(Objective):
    """As T5 learns: spans are cut out of the encoder's text, each replaced by a sentinel, and the decoder gives them.

    All blocks have as many spans and as many tokens in them, so nothing is padded (Raffel et al., 1910.10683, 3.1.4).
    """

    needs = ("pad_token", "eos_token")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: SpanTextConfig) -> None:
        super().__init__(tokenizer, config)
        self._cut, self._spans = config.cut, config.spans
        names = [SENTINEL.format(index) for index in range(self._spans)]
        known = tokenizer.get_vocab()
        lacking = [name for name in names if name not in known]
        if lacking:
            raise FusionError(
                f"the tokenizer has no {lacking[0]}, and blocks with {self._spans} spans need as many sentinels; lower "
                "--data.block_size, or give --data.tokenizer another"
            )
        self._sentinels = torch.tensor([known[name] for name in names])

    @staticmethod
    def train_tokenizer(texts: Iterable[str], config: Any) -> PreTrainedTokenizerBase:
        """A BPE of bytes with T5's special tokens, and as many sentinels as a block has spans."""
        sentinels = [SENTINEL.format(index) for index in range(config.spans)]
        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        return train_bpe(texts, config.vocab_size, special, sentinels)

    @property
    def frame(self) -> Frame:
        """Blocks are text alone."""
        return Frame(self.config.block_size, lines=True)

    def examples(self, ids: Tensor) -> dict[str, Tensor]:
        """What the encoder reads, what the decoder reads (the labels, one later), and the labels."""
        out = self._drawn(len(ids))
        labels = self._marked(ids, out, ~out)
        start = torch.full_like(labels[:, :1], self.tokenizer.pad_token_id)
        return {
            "input_ids": self._marked(ids, ~out, out),
            "decoder_input_ids": torch.cat([start, labels[:, :-1]], 1),
            "labels": labels,
        }

    def candidates(self, ids: Tensor) -> Tensor:
        """Labels of spans drawn once: sentinels and ends are as frequent in them as in any others."""
        return self.examples(ids)["labels"].flatten()

    def model_args(self) -> dict[str, Any]:
        """The vocabulary's size and the special tokens."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return {
            "vocab_size": len(self.tokenizer),
            "pad_token_id": pad,
            "eos_token_id": eos,
            "decoder_start_token_id": pad,
        }

    def _drawn(self, count: int) -> Tensor:
        """Which tokens are cut out, bool [count, T]: text and spans in turn, each of random length, text first."""
        text = _parts(count, self.config.block_size - self._cut, self._spans)
        cut = _parts(count, self._cut, self._spans)
        runs = torch.stack([text, cut], 2).flatten(1)
        ends = runs.cumsum(1)
        at = torch.arange(self.config.block_size).expand(count, -1).contiguous()
        return torch.searchsorted(ends, at, right=True) % 2 == 1

    def _marked(self, ids: Tensor, stays: Tensor, goes: Tensor) -> Tensor:
        """What stays of blocks, a sentinel for every run that goes, and the end."""
        first = goes & ~torch.cat([torch.zeros_like(goes[:, :1]), goes[:, :-1]], 1)
        number = (first.cumsum(1) - 1).clamp_min(0)
        marked = torch.where(first, self._sentinels[number], ids)[stays | first].view(len(ids), -1)
        return torch.cat([marked, torch.full_like(marked[:, :1], self.tokenizer.eos_token_id)], 1)


def _parts(count: int, total: int, parts: int) -> Tensor:
    """Random positive numbers [count, parts] with the sum `total` in every row; every division is as likely."""
    cuts = torch.rand(count, total - 1).argsort(1)[:, : parts - 1].sort(1).values + 1
    edges = torch.cat([torch.zeros(count, 1, dtype=cuts.dtype), cuts, torch.full((count, 1), total)], 1)
    return edges.diff(dim=1)
