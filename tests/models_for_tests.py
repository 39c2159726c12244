"""Tiny real models of both libraries, with weights drawn wide enough that their outputs are not trivial."""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    RobertaConfig,
    ViTConfig,
    ViTForImageClassification,
)

from fusionpl.calibration import logits

SIZE, CHANNELS, CLASSES = 16, 3, 5
STD = 0.2
Builder = Callable[..., nn.Module]


def redrawn(model: nn.Module, seed: int, std: float = STD) -> nn.Module:
    """Draws all weights anew: matrices and biases around 0, one-dimensional weights (norms, gammas) around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.ndim == 1 and not name.endswith("bias")
            parameter.copy_(float(scale) + std * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def timm_vit(
    seed: int = 0, *, width: int = 16, heads: int = 4, mlp: int = 24, head_dim: int | None = None, **options: Any
) -> nn.Module:
    """A timm ViT of 2 blocks on 16 x 16 images cut into 16 patches, 5 classes; `head_dim` frees the heads' width."""
    options = {"depth": 2, "num_classes": CLASSES, **options}
    if head_dim is not None:

        class Heads(Attention):
            def __init__(self, dim: int, **settings: Any) -> None:
                super().__init__(dim, attn_head_dim=head_dim, **settings)

        options["attn_layer"] = Heads
    model = VisionTransformer(
        img_size=SIZE,
        patch_size=4,
        in_chans=CHANNELS,
        embed_dim=width,
        num_heads=heads,
        mlp_ratio=mlp / width,
        **options,
    )
    return redrawn(model, seed)


def hf_vit(
    seed: int = 0, *, width: int = 16, heads: int = 4, mlp: int = 24, head_dim: int | None = None, **options: Any
) -> nn.Module:
    """The transformers ViT of the same size."""
    options = {"num_hidden_layers": options.pop("depth", 2), "num_labels": CLASSES, **options}
    if head_dim is not None:
        options["head_dim"] = head_dim
    config = ViTConfig(
        image_size=SIZE, patch_size=4, num_channels=CHANNELS, hidden_size=width, num_attention_heads=heads,
        intermediate_size=mlp, **options,
    )  # fmt: skip
    return redrawn(ViTForImageClassification(config), seed)


FAMILIES: dict[str, Builder] = {"vit_timm": timm_vit, "vit_hf": hf_vit}


def images(count: int = 24, seed: int = 0) -> Tensor:
    """[count, 3, 16, 16], standard normal."""
    return torch.randn(count, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def outputs(model: nn.Module, batch: Tensor | None = None) -> Tensor:
    """Logits without gradients, by default on images that no calibration here uses."""
    with torch.inference_mode():
        return logits(model, images(16, seed=99) if batch is None else batch)


def largest_difference(a: nn.Module, b: nn.Module) -> float:
    """Over all parameters, by name."""
    others = dict(b.named_parameters())
    return max(float((tensor - others[name]).detach().abs().max()) for name, tensor in a.named_parameters())


VOCABULARY, POSITIONS = 40, 20


def text_model(
    name: str, seed: int = 0, *, width: int = 16, heads: int = 4, mlp: int = 24, depth: int = 2
) -> nn.Module:
    """A BERT-like model of transformers: `bert masked-lm`, `roberta classifier`, ...; vocabulary 40, 20 positions."""
    family, _, head = name.partition(" ")
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "num_labels": CLASSES, "pad_token_id": 0}
    common = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": mlp}
    config: Any
    if family == "distilbert":
        config = DistilBertConfig(
            dim=width, n_layers=depth, n_heads=heads, hidden_dim=mlp, max_position_embeddings=POSITIONS, **sizes
        )
    elif family == "roberta":
        config = RobertaConfig(max_position_embeddings=POSITIONS + 2, **common, **sizes)
    else:
        config = BertConfig(max_position_embeddings=POSITIONS, **common, **sizes)
    auto = AutoModelForMaskedLM if head == "masked-lm" else AutoModelForSequenceClassification
    return redrawn(auto.from_config(config), seed)


TEXT_MODELS = tuple(f"{family} {head}" for family in ("bert", "roberta", "distilbert")
                    for head in ("masked-lm", "classifier"))  # fmt: skip


def sentences(count: int = 24, seed: int = 0) -> dict[str, Tensor]:
    """Random sentences of 4 to 12 tokens, padded to 12 with token 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (count, 12), generator=generator)
    lengths = torch.randint(4, 13, (count,), generator=generator)
    mask = (torch.arange(12) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def text_outputs(model: nn.Module, batch: dict[str, Tensor] | None = None) -> Tensor:
    """Logits of real tokens, by default on sentences that no calibration here uses."""
    batch = sentences(16, seed=99) if batch is None else batch
    with torch.inference_mode():
        found = logits(model, batch)
    return found[batch["attention_mask"].bool()] if found.ndim == 3 else found
