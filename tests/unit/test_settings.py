"""What happens when parents differ in what no tensor shows: every setting is judged, and the judgements hold."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from timm.layers.mlp import GluMlp
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

from benchmarks.settings import DOCS, classes, section, settings_of
from fusionpl import FuseConfig, FusionError, fuse
from fusionpl.alignment.config import AlignConfig
from fusionpl.calibration.forward import logits
from fusionpl.fusion.config import RefitConfig
from fusionpl.models.settings import compare_settings, judgements
from tests.models_for_tests import hf_vit, images, redrawn, timm_vit

NAMES = dict.fromkeys(["A", "B"])
TINY: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Transport that has to give parent B back, where the fused model computes as B does.
ONLY_B = FuseConfig(
    strategy="transport", weights=(0.0, 1.0), refit=RefitConfig(method="none"),
    align=AlignConfig(solver="emd", residual="tie", heads="matched", qk="shared"),
)  # fmt: skip


def llama(seed: int = 0, cls: Any = transformers.LlamaForCausalLM, **settings: Any) -> nn.Module:
    config = cls.config_class(**{**TINY, "num_key_value_heads": 2, **settings})
    return redrawn(cls(config), seed)


mistral = partial(llama, cls=transformers.MistralForCausalLM)


def bert(seed: int = 0, cls: Any = transformers.BertForMaskedLM, **settings: Any) -> nn.Module:
    return redrawn(cls(transformers.BertConfig(**{**TINY, **settings})), seed)


def gpt2(seed: int = 0, **settings: Any) -> nn.Module:
    sizes = {"n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": 32, "vocab_size": 50, "bos_token_id": 1}
    return redrawn(
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, "eos_token_id": 1, **settings})), seed
    )


def t5(seed: int = 0, **settings: Any) -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
    config = transformers.T5Config(**{**sizes, "decoder_start_token_id": 0, **settings})
    return redrawn(transformers.T5ForConditionalGeneration(config), seed)


def modernbert(
    seed: int = 0, cls: Any = transformers.ModernBertForSequenceClassification, **settings: Any
) -> nn.Module:
    settings = {"local_attention": 8, "cls_token_id": 1, "sep_token_id": 2, "num_labels": 5, **settings}
    return redrawn(cls(transformers.ModernBertConfig(**{**TINY, **settings})), seed)


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (8, 24), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def seq2seq() -> dict[str, Tensor]:
    return {**tokens(), "decoder_input_ids": tokens()["input_ids"][:, :8]}


class OwnForward(transformers.LlamaForCausalLM):
    def forward(self, *args: Any, **more: Any) -> Any:
        found = super().forward(*args, **more)
        found.logits = 2 * found.logits
        return found


class OwnPart(transformers.BertForMaskedLM):
    def get_output_embeddings(self) -> Any:  # what a forward pass does not call may differ
        return super().get_output_embeddings()


WARNED: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]] = {
    "activation": (bert, partial(bert, 1, hidden_act="relu"), "hidden_act"),
    "activation of timm": (timm_vit, partial(timm_vit, 1, act_layer="quick_gelu"), "mlp.act"),
    "norm": (bert, partial(bert, 1, layer_norm_eps=0.1), "layer_norm_eps"),
    "norm of timm": (timm_vit, partial(timm_vit, 1, norm_layer=partial(nn.LayerNorm, eps=0.1)), "norm1.eps"),
    "sliding window": (llama, partial(mistral, 1, sliding_window=4), "sliding_window"),
    "rotary base": (
        llama, partial(llama, 1, rope_parameters={"rope_type": "default", "rope_theta": 9.0}), "rope_theta",
    ),
    "rotary scaling": (
        llama,
        partial(llama, 1, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
        "rope_type",
    ),
    "scale of attention": (gpt2, partial(gpt2, 1, scale_attn_weights=False), "scale_attn_weights"),
    "scale by layer": (gpt2, partial(gpt2, 1, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer"),
    "causal encoder": (bert, partial(bert, 1, is_decoder=True), "is_decoder"),
    "outputs of T5": (t5, partial(t5, 1, scale_decoder_outputs=False), "scale_decoder_outputs"),
    "distances of T5": (t5, partial(t5, 1, relative_attention_max_distance=16), "relative_attention_max_distance"),
    "layers of ModernBERT": (
        modernbert,
        partial(modernbert, 1, layer_types=["sliding_attention", "full_attention"]),
        "layer_types",
    ),
    "window of ModernBERT": (modernbert, partial(modernbert, 1, local_attention=4), "local_attention"),
    "prefix that is averaged": (
        partial(timm_vit, global_pool="avg"),
        partial(timm_vit, 1, global_pool="avg", pool_include_prefix=True),
        "pool_include_prefix",
    ),
    "which half is the gate": (
        partial(timm_vit, mlp_layer=GluMlp),
        partial(timm_vit, 1, mlp_layer=partial(GluMlp, gate_last=False)),
        "gate_last",
    ),
}  # fmt: skip
REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]] = {
    "own forward": (llama, partial(llama, 1, cls=OwnForward), "OwnForward"),
    "pooling of timm": (timm_vit, partial(timm_vit, 1, global_pool="avg", fc_norm=False), "global_pool"),
    "mean and maximum": (
        partial(timm_vit, global_pool="avg"), partial(timm_vit, 1, global_pool="max"), "global_pool",
    ),
    "pooling of ModernBERT": (
        partial(modernbert, classifier_pooling="cls"), partial(modernbert, 1, classifier_pooling="mean"),
        "classifier_pooling",
    ),
    "blocks": (
        partial(timm_vit, init_values=0.1), partial(timm_vit, 1, init_values=0.1, block_fn=ResPostBlock), "ResPostBlock"
    ),
}  # fmt: skip


def compared(a: nn.Module, b: nn.Module) -> list[str]:
    return compare_settings({"A": a, "B": b}, "A")


@pytest.mark.parametrize("name", WARNED)
def test_a_setting_that_changes_the_function_is_one_line(name: str) -> None:
    a, b, key = WARNED[name]
    (line,) = compared(a(), b())
    assert key in line
    assert "fused model computes as A does" in line
    assert compared(b(), b()) == []


@pytest.mark.parametrize("name", REFUSED)
def test_another_function_is_refused(name: str) -> None:
    a, b, key = REFUSED[name]
    with pytest.raises(FusionError, match=key):
        compared(a(), b())


ALIKE: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "Llama and Mistral": (llama, partial(mistral, 1, sliding_window=None)),
    "widths": (llama, partial(llama, 1, hidden_size=32, intermediate_size=48)),
    "depths": (timm_vit, partial(timm_vit, 1, depth=3)),
    "widths of timm": (timm_vit, partial(timm_vit, 1, width=24, heads=2)),
    "dropout": (bert, partial(bert, 1, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.0)),
    "dropped paths": (timm_vit, partial(timm_vit, 1, drop_path_rate=0.2, proj_drop_rate=0.1)),
    "chunks": (bert, partial(bert, 1, chunk_size_feed_forward=4)),
    "a method that no forward pass calls": (bert, partial(bert, 1, cls=OwnPart)),
    "norms of two libraries": (timm_vit, partial(timm_vit, 1, norm_layer=partial(nn.LayerNorm, eps=1e-6))),
    "ViT": (hf_vit, partial(hf_vit, 1)),
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_changes_no_function_is_silent(name: str) -> None:
    a, b = ALIKE[name]
    assert compared(a(), b()) == []


FUSED = {
    name: pair
    for name, pair in {**{key: one[:2] for key, one in WARNED.items()}, **ALIKE}.items()
    if "width" not in name and "depth" not in name
}


@pytest.mark.parametrize("name", FUSED)
def test_parent_b_is_given_back_or_there_is_a_line(name: str) -> None:
    a, b = (make() for make in FUSED[name])
    batch = images() if "pixel" in getattr(a, "main_input_name", "pixel") else seq2seq() if "T5" in name else tokens()
    result = fuse([a, b], [batch], ONLY_B)
    with torch.inference_mode():
        ours, theirs = logits(result.model, batch), logits(b, batch)
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    summary = any("compute differently" in line for line in result.warnings)
    assert summary == (name in WARNED)
    assert error < 1e-3 or summary, error


def test_a_setting_that_is_warned_of_does_change_the_function() -> None:
    a, b, _ = WARNED["sliding window"]
    result = fuse([a(), b()], [tokens()], ONLY_B)
    with torch.inference_mode():
        ours, theirs = logits(result.model, tokens()), logits(b(), tokens())
    assert float((ours - theirs).abs().max() / theirs.abs().max()) > 1e-2


def test_buffers_of_other_values_are_refused() -> None:
    a, b = bert(), bert(1)
    for model, value in ((a, 1.0), (b, 3.0)):
        model.register_buffer("temperature", torch.tensor(value))
    with pytest.raises(FusionError, match="buffer 'temperature' of B is not that of A"):
        compared(a, b)
    b.temperature.fill_(1.0)
    assert compared(a, b) == []


def test_a_forward_that_was_put_on_one_model_is_refused() -> None:
    a, b = bert(), bert(1)
    b.forward = partial(type(b).forward, b)
    with pytest.raises(FusionError, match="forward of its own"):
        compared(a, b)


def test_a_setting_that_nobody_knows_is_one_line() -> None:
    a, b = bert(), bert(1)
    a.config.temperature, b.config.temperature = 1.0, 2.0
    (line,) = compared(a, b)
    assert "temperature is 1.0 in A and 2.0 in B (and what that does is not known here)" in line


def test_sizes_of_a_users_module_are_no_setting() -> None:
    a, b = timm_vit(), timm_vit(1, width=24)
    a.blocks[0].own_size, b.blocks[0].own_size = 16, 24
    assert compared(a, b) == []
    c = copy.deepcopy(a)
    c.blocks[0].own_size = 3
    assert "blocks.*.own_size" in compared(a, c)[0]


def test_heads_built_otherwise_are_told() -> None:
    a = llama(num_attention_heads=4, head_dim=4)
    b = llama(1, num_attention_heads=4, head_dim=8)
    result = fuse([a, b], [tokens()], FuseConfig(strategy="joint", refit=RefitConfig(method="ridge")))
    (line,) = [line for line in result.warnings if "none of its heads" in line]
    assert line.startswith(
        "parent 1 has heads of 8 units, 8 of them rotated, 2 to a key-value head, the fused model of 4"
    )


def test_the_command_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fusionpl.cli import fuse as command
    from fusionpl.cli.running import main

    for name, model in {"a": hf_vit(), "b": hf_vit(1, hidden_act="relu")}.items():
        model.save_pretrained(tmp_path / name)
    words = ["--parents", str(tmp_path / "a"), str(tmp_path / "b"), "--data.path", "digits", "--dry-run"]
    assert main(command.run, words) == 0
    assert (
        "warning: a and b compute differently, and the fused model computes as a does: hidden_act"
        in capsys.readouterr().out
    )


def attributes() -> Iterator[tuple[str, str]]:
    for cls in classes():
        for key in settings_of(cls):
            yield cls.__name__, key


def test_every_setting_of_every_family_is_judged() -> None:
    known = judgements("config")
    missing = sorted({key for _, key in attributes()} - known.keys())
    assert not missing, f"judge these in fusionpl/models/settings.yaml: {missing}"


def test_every_attribute_of_timms_modules_is_judged() -> None:
    from fusionpl.models.settings import _plain

    known = judgements("modules")
    variants: list[dict[str, Any]] = [
        {}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}, {"init_values": 0.1, "qk_norm": True},
        {"mlp_layer": GluMlp}, {"pre_norm": True}, {"proj_drop_rate": 0.1, "drop_path_rate": 0.1},
        {"final_norm": False},
    ]  # fmt: skip
    found = {key for options in variants for one in timm_vit(**options).modules() for key in _plain(one)}
    assert not found - known.keys(), f"judge these in fusionpl/models/settings.yaml: {sorted(found - known.keys())}"


def test_the_table_of_the_docs_is_that_of_the_judgements() -> None:
    assert section() in DOCS.read_text(), "run python -m benchmarks.settings"
