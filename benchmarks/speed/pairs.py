"""Parents with random weights, and the calibration batches they are fused on."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from fusionpl.calibration.forward import Batch

TOKENS = 64  # of a sequence
_STD = 0.02


@dataclass(frozen=True)
class Shape:
    """An architecture and its sizes.

    Attributes:
        kind: a timm ViT on 32x32 images cut into 4x4 patches, or a BERT on sequences of 64 tokens.
        width, depth, heads, mlp: of the stream, in blocks, of attention, of the hidden layer.
        channels: of the images.
        vocabulary: of the text.
    """

    kind: Literal["vit", "bert"]
    width: int
    depth: int
    heads: int
    mlp: int
    channels: int = 3
    vocabulary: int = 30522

    def model(self, seed: int) -> nn.Module:
        """A parent, in evaluation mode."""
        torch.manual_seed(seed)
        model: nn.Module
        if self.kind == "bert":
            model = cast(nn.Module, BertForMaskedLM(self.config))
            return model.eval()
        model = VisionTransformer(
            img_size=32, patch_size=4, in_chans=self.channels, num_classes=10, embed_dim=self.width, depth=self.depth,
            num_heads=self.heads, mlp_ratio=self.mlp / self.width,
        )  # fmt: skip
        return model.eval()

    @property
    def config(self) -> BertConfig:
        """Of a BERT."""
        return BertConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, num_hidden_layers=self.depth,
            num_attention_heads=self.heads, intermediate_size=self.mlp, max_position_embeddings=TOKENS,
        )  # fmt: skip

    def batches(self, samples: int, size: int) -> Iterator[Batch]:
        """Random samples, the same each time, made when they are asked for: they take no memory."""
        generator = torch.Generator().manual_seed(0)
        for start in range(0, samples, size):
            count = min(size, samples - start)
            if self.kind == "bert":
                yield {"input_ids": torch.randint(self.vocabulary, (count, TOKENS), generator=generator)}
            else:
                yield torch.randn(count, self.channels, 32, 32, generator=generator)


def write_folder(shape: Shape, seed: int, folder: Path) -> None:
    """Writes a BERT in bfloat16 as a sharded model folder, with one block at a time in memory.

    Args:
        shape: its sizes.
        seed: decides its weights.
        folder: where it goes.
    """
    folder.mkdir(parents=True)
    with torch.device("meta"):
        module = BertForMaskedLM(shape.config)
    shards: dict[str, list[str]] = {}
    for name, _ in module.named_parameters():
        words = name.split(".")
        shards.setdefault(".".join(words[:4]) if "layer" in words else words[0] + words[1], []).append(name)
    generator = torch.Generator().manual_seed(seed)
    index: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards.values(), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _drawn(name, module.get_parameter(name).shape, generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    settings = {**shape.config.to_dict(), "architectures": ["BertForMaskedLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(settings, indent=1))  # last: it says that the folder is complete


def _drawn(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if len(shape) > 1:
        return (_STD * torch.randn(shape, generator=generator)).bfloat16()
    return torch.full(shape, float(name.endswith("weight")), dtype=torch.bfloat16)
