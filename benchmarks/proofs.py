"""The proof of every family of the library on a model of some millions of parameters: its error and its time.

    python -m benchmarks.proofs [--output docs/results/proofs.md]

Weights are random, so that no two units are alike. The proof is what `fuse.py --check` does with a parent: run it,
move the units of every free axis at random as far as the family allows, run it again.
"""

import argparse
import inspect
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from benchmarks.common import markdown
from benchmarks.origin import Origin, footer, here
from fusionpl.calibration.forward import logits
from fusionpl.cli.running import main as run_command
from fusionpl.cli.running import quiet
from fusionpl.families.binding import bind
from fusionpl.families.proof import permutation_error

WIDTH, DEPTH, HEADS, HIDDEN, VOCABULARY, TOKENS, SAMPLES = 256, 6, 4, 1024, 1000, 64, 16
COMMON: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": HIDDEN,
    "vocab_size": VOCABULARY, "max_position_embeddings": 2 * TOKENS, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
SHARED_KEYS = {"num_key_value_heads": HEADS // 2}
IMAGES: dict[str, Any] = {"image_size": 32, "patch_size": 4, "num_labels": 10}
TOWER = {key: COMMON[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
# Family -> what transformers calls it, the task of the model, and what its configuration has of its own.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit_hf": ("vit", "ImageClassification", IMAGES),
    "deit": ("deit", "ImageClassification", IMAGES),
    "dinov2": ("dinov2", "ImageClassification", {**IMAGES, "use_swiglu_ffn": True}),
    "dinov2_with_registers": ("dinov2_with_registers", "ImageClassification", IMAGES),
    "bert": ("bert", "MaskedLM", {}),
    "roberta": ("roberta", "MaskedLM", {}),
    "distilbert": (
        "distilbert", "MaskedLM", {"dim": WIDTH, "n_layers": DEPTH, "n_heads": HEADS, "hidden_dim": HIDDEN}
    ),
    "electra": ("electra", "MaskedLM", {"embedding_size": WIDTH}),
    "electra_small": ("electra", "MaskedLM", {"embedding_size": 128}),
    "modernbert": ("modernbert", "MaskedLM", {"local_attention": 32, "cls_token_id": 1, "sep_token_id": 2}),
    "gpt2": ("gpt2", "CausalLM", {"n_inner": HIDDEN}),
    "gpt_neox": ("gpt_neox", "CausalLM", {}),
    "gpt_neox_sequential": ("gpt_neox", "CausalLM", {"use_parallel_residual": False}),
    "llama": ("llama", "CausalLM", SHARED_KEYS),
    "llama (Mistral)": ("mistral", "CausalLM", SHARED_KEYS),
    "qwen2": ("qwen2", "CausalLM", SHARED_KEYS),
    "qwen3": ("qwen3", "CausalLM", {**SHARED_KEYS, "head_dim": WIDTH // HEADS}),
    "gemma": ("gemma", "CausalLM", {**SHARED_KEYS, "head_dim": WIDTH // HEADS}),
    "gemma2": ("gemma2", "CausalLM", {**SHARED_KEYS, "head_dim": WIDTH // HEADS, "sliding_window": 32}),
    "gemma3": ("gemma3_text", "CausalLM", {**SHARED_KEYS, "head_dim": WIDTH // HEADS, "sliding_window": 32}),
    "phi3": ("phi3", "CausalLM", {}),
    "opt": ("opt", "CausalLM", {"ffn_dim": HIDDEN, "word_embed_proj_dim": WIDTH}),
    "opt_post": (
        "opt", "CausalLM", {"ffn_dim": HIDDEN, "word_embed_proj_dim": WIDTH // 2, "do_layer_norm_before": False}
    ),
    "opt_post_unprojected": (
        "opt", "CausalLM", {"ffn_dim": HIDDEN, "word_embed_proj_dim": WIDTH, "do_layer_norm_before": False}
    ),
    "t5": (
        "t5", "Seq2SeqLM",
        {"d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": HIDDEN, "num_layers": DEPTH, "num_heads": HEADS,
         "decoder_start_token_id": 0},
    ),
}  # fmt: skip


def of_transformers(name: str, task: str, own: dict[str, Any]) -> nn.Module:
    config = transformers.AutoConfig.for_model(name, architectures=[], **{**COMMON, **own})
    model: nn.Module = getattr(transformers, f"AutoModelFor{task}").from_config(config)
    return model


def timm_vit(**own: Any) -> nn.Module:
    return VisionTransformer(
        img_size=32, patch_size=4, num_classes=10, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, init_values=0.5,
        reg_tokens=4, **own,
    )  # fmt: skip


def clip(name: str, config: Any, **own: Any) -> nn.Module:
    model: nn.Module = getattr(transformers, name)(config(projection_dim=128, **own))
    return model


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "vit_timm": timm_vit,
    "vit_timm_pairs": lambda: timm_vit(block_fn=ParallelThingsBlock),
    "vit_timm_parallel": lambda: timm_vit(block_fn=ParallelScalingBlock),
    "vit_timm_res_post": lambda: timm_vit(block_fn=ResPostBlock),
    **{name: partial(of_transformers, *one) for name, one in MODELS.items()},
    "siglip_vision": lambda: transformers.SiglipForImageClassification(
        transformers.SiglipConfig(vision_config={**TOWER, **IMAGES, "vision_use_head": False})
    ),
    "clip_vision": lambda: clip("CLIPVisionModelWithProjection", transformers.CLIPVisionConfig, **TOWER, **IMAGES),
    "clip_text": lambda: clip("CLIPTextModelWithProjection", transformers.CLIPTextConfig, **COMMON),
    "clip": lambda: clip("CLIPModel", transformers.CLIPConfig, text_config=COMMON, vision_config={**TOWER, **IMAGES}),
}


def drawn(model: nn.Module) -> nn.Module:
    """Changes every parameter a little: biases of zero and gains of one hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def batch_for(model: nn.Module) -> dict[str, Tensor]:
    """Random inputs of the kinds that the model takes."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (SAMPLES, TOKENS), generator=generator)
    ids[:, -1] = 2  # CLIP reads what stands at the end
    images = torch.randn(SAMPLES, 3, 32, 32, generator=generator)
    kinds = {"pixel_values": images, "input_ids": ids, "decoder_input_ids": ids}
    names = inspect.signature(type(model).forward).parameters
    return {name: value for name, value in kinds.items() if name in names} or {"pixel_values": images}


def row(name: str, build: Callable[[], nn.Module]) -> list[str]:
    torch.manual_seed(0)
    model = drawn(build())
    assert bind(model).family.name == name.partition(" ")[0]
    batch = batch_for(model)

    def run(one: nn.Module) -> Tensor:
        return logits(one, batch)

    start = time.perf_counter()
    error = permutation_error(model, run)
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        size = float(run(model).abs().max())
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return [f"`{name}`", type(model).__name__, f"{millions:.1f} M", f"{error / size:.1e}", f"{seconds:.2f} s"]


def run(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.proofs", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results/proofs.md"))
    args = parser.parse_args(argv)
    quiet()
    rows = [row(name, build) for name, build in BUILDERS.items()]
    text = "\n".join([
        f"The proof of every family on a model of {DEPTH} blocks, {WIDTH} wide, with random weights, in float32: the "
        "largest change of an output as a share of the largest output, and the time of the proof.",
        "",
        markdown(["family", "model", "parameters", "error", "time"], rows),
        "",
        footer("python -m benchmarks.proofs", [Origin(**here())], ["0"]),
    ])  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text)
    print(text)


if __name__ == "__main__":
    sys.exit(run_command(run))
