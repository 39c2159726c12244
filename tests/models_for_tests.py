"""Tiny real models of both libraries, with weights drawn wide enough that their outputs are not trivial."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.mlp import SwiGLU, SwiGLUPacked
from timm.layers.norm import RmsNorm
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    BertConfig,
    CamembertConfig,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    SiglipConfig,
    SiglipForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    XLMRobertaConfig,
)

from fusionpl.calibration.forward import logits

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


def causal_model(name: str, seed: int = 0, *, width: int = 16, heads: int = 4, kv: int = 2, mlp: int = 24,
                 depth: int = 2, classifier: bool = False, **options: Any) -> nn.Module:  # fmt: skip
    """A tiny decoder of transformers: vocabulary 40, 20 positions; `kv` key-value heads where the family has them."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
        "intermediate_size": mlp, "max_position_embeddings": POSITIONS, "num_labels": CLASSES,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if name == "gpt2":
        common["n_inner"] = common.pop("intermediate_size")
    elif name == "opt":
        common |= {"ffn_dim": common.pop("intermediate_size"), "word_embed_proj_dim": width}
    elif name != "gpt_neox":
        common["num_key_value_heads"] = kv
    config = AutoConfig.for_model(name, **{**common, **options})
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    return redrawn(auto.from_config(config), seed)


def rope(share: float) -> dict[str, Any]:
    """Rotary embedding of a share of each head."""
    return {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": share}


CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2, decoder of its own": ("gpt2", {"tie_word_embeddings": False}),
    "gpt2 classifier": ("gpt2", {"classifier": True}),
    "gpt_neox": ("gpt_neox", {"width": 32, "rope_parameters": rope(0.5)}),
    "gpt_neox, all rotary": ("gpt_neox", {"rope_parameters": rope(1.0)}),
    "gpt_neox, sequential": ("gpt_neox", {"width": 32, "rope_parameters": rope(0.5), "use_parallel_residual": False}),
    "gpt_neox classifier": ("gpt_neox", {"width": 32, "rope_parameters": rope(0.25), "classifier": True}),
    "llama": ("llama", {}),
    "llama, heads apart": ("llama", {"kv": 4}),
    "llama, one key-value head": ("llama", {"kv": 1}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama classifier": ("llama", {"classifier": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3 classifier": ("qwen3", {"head_dim": 8, "classifier": True}),
    "opt": ("opt", {}),
    "opt, decoder of its own": ("opt", {"tie_word_embeddings": False}),
    "opt classifier": ("opt", {"classifier": True}),
    "opt, post-LN": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 8}),
    "opt classifier, post-LN": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 8, "classifier": True}),
    "opt, post-LN, unprojected": ("opt", {"do_layer_norm_before": False}),
    "phi3": ("phi3", {"kv": 4, "sliding_window": 4}),
    "phi3, groups, partly rotary": ("phi3", {"width": 32, "rope_parameters": rope(0.75)}),
    "phi3 classifier": ("phi3", {"classifier": True}),
    "gemma": ("gemma", {"head_dim": 8, "kv": 1}),
    "gemma, decoder of its own": ("gemma", {"head_dim": 8, "tie_word_embeddings": False}),
    "gemma classifier": ("gemma", {"head_dim": 8, "classifier": True}),
    "gemma2": ("gemma2", {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 12,
                          "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
    "gemma2 classifier": ("gemma2", {"head_dim": 8, "sliding_window": 4, "classifier": True}),
    "gemma3": ("gemma3_text", {"head_dim": 8, "kv": 1, "sliding_window": 4,
                               "layer_types": ["sliding_attention", "full_attention"]}),
    "gemma3 classifier": ("gemma3_text", {"head_dim": 8, "sliding_window": 4, "classifier": True}),
}  # fmt: skip


def causal(variant: str, seed: int = 0, **options: Any) -> nn.Module:
    """One of CAUSAL."""
    name, own = CAUSAL[variant]
    return causal_model(name, seed, **{**own, **options})


def _vision(cls: type[PreTrainedModel], config: type[PreTrainedConfig], seed: int, **options: Any) -> nn.Module:
    sizes = {"image_size": SIZE, "patch_size": 4, "num_channels": CHANNELS, "hidden_size": 16, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_labels": CLASSES, "layerscale_value": 1.0}  # fmt: skip
    return redrawn(cls(config(**{**sizes, **options})), seed)


def distilled(seed: int = 0, *, width: int = 16) -> nn.Module:
    """timm's DeiT with a distillation token."""
    model = VisionTransformerDistilled(
        img_size=SIZE, patch_size=4, in_chans=CHANNELS, embed_dim=width, num_heads=4, depth=2, num_classes=CLASSES
    )
    return redrawn(model, seed)


def siglip(seed: int = 0, **options: Any) -> nn.Module:
    """A classifier on SigLIP's vision tower."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": SIZE, "patch_size": 4, **options}  # fmt: skip
    config = SiglipConfig(vision_config=vision, text_config={"num_hidden_layers": 0}, num_labels=CLASSES)
    return redrawn(SiglipForImageClassification(config), seed)


VISION: dict[str, Callable[[int], nn.Module]] = {
    "timm, distilled": distilled,
    "timm, DINOv2": lambda seed: timm_vit(seed, reg_tokens=3, no_embed_class=True, init_values=0.5),
    "timm, packed gate": lambda seed: timm_vit(seed, mlp_layer=SwiGLUPacked, init_values=0.5),
    "timm, packed gate, normed": lambda seed: timm_vit(seed, mlp_layer=partial(SwiGLUPacked, norm_layer=nn.LayerNorm)),
    "timm, gate": lambda seed: timm_vit(seed, mlp_layer=SwiGLU),
    "timm, norms behind": lambda seed: timm_vit(seed, block_fn=ResPostBlock),
    "timm, one map": lambda seed: timm_vit(seed, block_fn=ParallelScalingBlock, init_values=0.5),
    "timm, two of each": lambda seed: timm_vit(seed, block_fn=ParallelThingsBlock, init_values=0.5),
    "timm, RMSNorm": lambda seed: timm_vit(seed, norm_layer=RmsNorm),
    "siglip": lambda seed: siglip(seed, vision_use_head=False),
    "deit": lambda seed: _vision(DeiTForImageClassification, DeiTConfig, seed, intermediate_size=24),
    "deit, distilled": lambda seed: _vision(
        DeiTForImageClassificationWithTeacher, DeiTConfig, seed, intermediate_size=24
    ),
    "dinov2": lambda seed: _vision(Dinov2ForImageClassification, Dinov2Config, seed),
    "dinov2, gate": lambda seed: _vision(Dinov2ForImageClassification, Dinov2Config, seed, use_swiglu_ffn=True),
    "dinov2, registers": lambda seed: _vision(
        Dinov2WithRegistersForImageClassification, Dinov2WithRegistersConfig, seed, num_register_tokens=3
    ),
}
ELECTRA: dict[str, Callable[[int], nn.Module]] = {
    f"electra {name}{note}": lambda seed, auto=auto, width=width: redrawn(
        auto.from_config(ElectraConfig(
            vocab_size=VOCABULARY, hidden_size=16, embedding_size=width, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=24, max_position_embeddings=POSITIONS, num_labels=CLASSES, pad_token_id=0,
        )), seed
    )
    for name, auto in {"discriminator": AutoModelForPreTraining, "masked-lm": AutoModelForMaskedLM,
                       "classifier": AutoModelForSequenceClassification}.items()
    for note, width in {"": 16, ", small": 8}.items()
}  # fmt: skip
# The same parameters as RoBERTa's, in classes of their own.
ROBERTA: dict[str, Callable[[int], nn.Module]] = {
    f"{name.replace('_', '-')} {head}": lambda seed, auto=auto, config=config: redrawn(
        auto.from_config(config(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
            max_position_embeddings=POSITIONS + 2, type_vocab_size=1, num_labels=CLASSES, pad_token_id=0,
        )), seed
    )
    for name, config in {"xlm_roberta": XLMRobertaConfig, "camembert": CamembertConfig}.items()
    for head, auto in {"masked-lm": AutoModelForMaskedLM, "classifier": AutoModelForSequenceClassification}.items()
}  # fmt: skip
MODERN: dict[str, Callable[[int], nn.Module]] = {
    f"modernbert {name}": lambda seed, auto=auto, options=options: redrawn(
        auto.from_config(ModernBertConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24,
            max_position_embeddings=POSITIONS, local_attention=8, global_attn_every_n_layers=2, num_labels=CLASSES,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, **options,
        )), seed
    )
    for name, auto, options in (
        ("masked-lm", AutoModelForMaskedLM, {}),
        ("classifier", AutoModelForSequenceClassification, {}),
        ("classifier, biases", AutoModelForSequenceClassification,
         {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True}),
    )
}  # fmt: skip


def t5(seed: int = 0, *, width: int = 16, heads: int = 4, mlp: int = 24, depth: int = 2, **options: Any) -> nn.Module:
    """An encoder of `depth` blocks and a decoder of one more; vocabulary 40."""
    config = T5Config(
        vocab_size=VOCABULARY, d_model=width, d_kv=4, num_heads=heads, d_ff=mlp, num_layers=depth,
        num_decoder_layers=depth + 1, relative_attention_num_buckets=8, relative_attention_max_distance=12,
        dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0, **options,
    )  # fmt: skip
    return redrawn(T5ForConditionalGeneration(config), seed)


def clip_model(cls: type[PreTrainedModel], seed: int, depth: int = 3) -> nn.Module:
    common = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "projection_dim": 12}
    text = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=16, max_position_embeddings=POSITIONS, eos_token_id=2, bos_token_id=1,
        pad_token_id=0, **common,
    )  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=20, image_size=SIZE, patch_size=4, **{**common, "num_hidden_layers": depth})
    whole = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12, num_labels=CLASSES)
    config = {CLIPTextModelWithProjection: text, CLIPVisionModelWithProjection: vision}.get(cls, whole)
    return redrawn(cls(config), seed)


# Several stacks of blocks, and the towers of one that has two.
STACKS: dict[str, Callable[[int], nn.Module]] = {
    "t5": t5,
    "t5, gated": lambda seed: t5(seed, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "clip": partial(clip_model, CLIPModel),
    "clip text": partial(clip_model, CLIPTextModelWithProjection),
    "clip vision": partial(clip_model, CLIPVisionModelWithProjection),
    "clip classifier": partial(clip_model, CLIPForImageClassification),
}


def batch_for(name: str, count: int = 24, seed: int = 0) -> dict[str, Tensor]:
    """What a model of any of these tables takes."""
    if name in VISION or name in ("clip vision", "clip classifier"):
        return {"pixel_values": images(count, seed)}
    found = sentences(count, seed)
    if name.startswith("t5"):
        given = sentences(count, seed + 1)
        found |= {f"decoder_{key}": value[:, :9] for key, value in given.items()}
    return found | ({"pixel_values": images(count, seed)} if name == "clip" else {})


def run(name: str, model: nn.Module, batch: dict[str, Tensor] | None = None) -> Tensor:
    """Outputs of a model of any of these tables, without gradients, of real tokens alone; by default on samples that no
    calibration here uses."""
    batch = batch_for(name, 16, seed=99) if batch is None else batch
    with torch.inference_mode():
        return real(logits(model, batch), batch)


def real(found: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Outputs of real tokens, where there is one a token."""
    mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
    return found if found.ndim < 3 or mask is None else found[mask.bool()]
