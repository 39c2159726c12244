"""Tiny models in the layouts, types and settings of published series, as their own libraries write them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.integration.runs import WORDS

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
END = "<|endoftext|>"
MASKED = {
    "unk_token": "[UNK]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
VOCABULARY = [*MASKED.values(), *WORDS, *"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghij")]


def lines(count: int = 400) -> list[str]:
    """Sentences of the words that `VOCABULARY` knows, all different in their order."""
    draw = torch.Generator().manual_seed(0)
    picked = torch.randint(len(WORDS), (count, 12), generator=draw).tolist()
    return [" ".join(WORDS[index] for index in row) for row in picked]


def byte_pairs(special: list[str], named: dict[str, str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def _decoder(folder: Path, cls: str, config: Any, dtype: torch.dtype, *, padded: bool = False, **saved: Any) -> None:
    """A decoder, with an end of text and, where `padded`, a token for padding that is the same."""
    named = {"bos_token": END, "eos_token": END, **({"pad_token": END} if padded else {})}
    byte_pairs([END], named).save_pretrained(folder)
    getattr(transformers, cls)(config).to(dtype).save_pretrained(folder, **saved)


def pythia(folder: Path) -> None:
    """Half precision, a vocabulary padded to a multiple of 64, partly rotary, no token for padding."""
    config = transformers.GPTNeoXConfig(**SMALL, vocab_size=320, rotary_pct=0.25, tie_word_embeddings=False,
                                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    _decoder(folder, "GPTNeoXForCausalLM", config, torch.float16)


def gpt2(folder: Path) -> None:
    """Tied; as many rows as tokens."""
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, vocab_size=300,
                                     bos_token_id=0, eos_token_id=0, initializer_range=0.2)  # fmt: skip
    _decoder(folder, "GPT2LMHeadModel", config, torch.float32)


def llama(folder: Path) -> None:
    """In shards with an index, grouped keys and values."""
    config = transformers.LlamaConfig(**SMALL, vocab_size=320, num_key_value_heads=2, bos_token_id=0, eos_token_id=0)
    _decoder(folder, "LlamaForCausalLM", config, torch.bfloat16, max_shard_size="20KB")


def mistral(folder: Path) -> None:
    """A sliding window, grouped keys and values."""
    config = transformers.MistralConfig(**SMALL, vocab_size=320, num_key_value_heads=2, sliding_window=32,
                                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    _decoder(folder, "MistralForCausalLM", config, torch.bfloat16)


def qwen2(folder: Path) -> None:
    """bfloat16, tied, a padded vocabulary, the end of text as padding."""
    config = transformers.Qwen2Config(**SMALL, vocab_size=384, num_key_value_heads=2, tie_word_embeddings=True,
                                      bos_token_id=0, eos_token_id=0)  # fmt: skip
    _decoder(folder, "Qwen2ForCausalLM", config, torch.bfloat16, padded=True)


def gemma3(folder: Path) -> None:
    """Tied, heads of a width of their own, norms around both branches and inside attention, windows in some layers."""
    config = transformers.Gemma3TextConfig(
        **SMALL, vocab_size=320, num_key_value_heads=1, head_dim=16, sliding_window=32, pad_token_id=0, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    _decoder(folder, "Gemma3ForCausalLM", config, torch.bfloat16, padded=True)


def phi3(folder: Path) -> None:
    """Queries, keys and values in one map, and the gate with what it multiplies."""
    config = transformers.Phi3Config(**SMALL, vocab_size=320, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    _decoder(folder, "Phi3ForCausalLM", config, torch.bfloat16, padded=True)


def opt(folder: Path) -> None:
    """Learned positions behind two for padding, ReLU, tied."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    config = transformers.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32, vocab_size=320, pad_token_id=0,
                                    bos_token_id=0, eos_token_id=0, init_std=0.2)  # fmt: skip
    _decoder(folder, "OPTForCausalLM", config, torch.float16, padded=True)


def _t5(folder: Path, *, tied: bool, **settings: Any) -> None:
    tokenizer = byte_pairs(
        ["<pad>", "</s>", "<unk>"], {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    )
    tokenizer.add_special_tokens({"extra_special_tokens": [f"<extra_id_{number}>" for number in range(100)]})
    tokenizer.save_pretrained(folder)
    config = transformers.T5Config(
        vocab_size=416, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1, tie_word_embeddings=tied, **settings,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)


def t5(folder: Path) -> None:
    """Tied, a padded vocabulary, a hundred sentinels."""
    _t5(folder, tied=True)


def flan_t5(folder: Path) -> None:
    """Gated, with a decoder of its own: version 1.1."""
    _t5(folder, tied=False, feed_forward_proj="gated-gelu")


def modernbert(folder: Path) -> None:
    """Rotary, pre-norm, a padded vocabulary."""
    numbers = {"pad_token_id": 1, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    byte_pairs(["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"], MASKED).save_pretrained(folder)
    transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(**SMALL, vocab_size=384, **numbers)
    ).save_pretrained(folder)


def multibert(folder: Path) -> None:
    """Two heads, vocab.txt and pytorch_model.bin, nothing else."""
    model = transformers.BertForPreTraining(transformers.BertConfig(**SMALL, vocab_size=len(VOCABULARY)))
    model.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")


def xlm_roberta(folder: Path) -> None:
    """RoBERTa's layout under another name, two positions for padding."""
    numbers = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    byte_pairs(["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"], MASKED).save_pretrained(folder)
    sizes = {**SMALL, "max_position_embeddings": 130}
    transformers.XLMRobertaForMaskedLM(
        transformers.XLMRobertaConfig(**sizes, vocab_size=320, **numbers)
    ).save_pretrained(folder)


def _image_sizes(**more: Any) -> dict[str, Any]:
    names = {0: "cat", 1: "dog"}
    labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    kept = {name: value for name, value in SMALL.items() if name != "max_position_embeddings"}
    return {**kept, "image_size": 32, "patch_size": 8, "num_channels": 3, **labels, **more}


def vit(folder: Path) -> None:
    """A classifier of colour images, which names its classes."""
    transformers.ViTForImageClassification(transformers.ViTConfig(**_image_sizes())).save_pretrained(folder)


def deit(folder: Path) -> None:
    """With a distillation token, and a teacher's head."""
    config = transformers.DeiTConfig(**_image_sizes())
    transformers.DeiTForImageClassificationWithTeacher(config).save_pretrained(folder)


def dinov2(folder: Path) -> None:
    """An encoder of images without a head, in half precision."""
    transformers.Dinov2Model(transformers.Dinov2Config(**_image_sizes())).half().save_pretrained(folder)


def sentence(folder: Path, pooling: str = "mean_tokens") -> None:
    """A BERT without a head, with the modules that sentence-transformers wrote before version 6."""
    transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=len(VOCABULARY))).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    settings = {"word_embedding_dimension": 32, f"pooling_mode_{pooling}": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))


TEXTS: tuple[Callable[[Path], None], ...] = (
    pythia, gpt2, llama, mistral, qwen2, gemma3, phi3, opt, t5, flan_t5, modernbert, multibert, xlm_roberta, sentence,
)  # fmt: skip
IMAGES: tuple[Callable[[Path], None], ...] = (vit, deit, dinov2)


def make_pair(series: Callable[[Path], None], home: Path) -> list[str]:
    """Two models of a series, of different seeds; the paths of their folders."""
    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        folder = home / f"{series.__name__}-{seed}"
        folder.mkdir(parents=True)
        series(folder)
        folders.append(str(folder))
    return folders
