"""The command that drafts a family, and a family of one's own in the other commands."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torchvision
import yaml
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

from fusionpl.calibration.forward import logits
from fusionpl.cli import family, fuse, sweep
from fusionpl.cli.jobs import family as job
from fusionpl.cli.running import main
from fusionpl.errors import FusionError
from fusionpl.families import draft
from fusionpl.families.axes import Binding
from fusionpl.families.binding import bind
from fusionpl.families.family import parse_family
from fusionpl.families.proof import permutation_error
from fusionpl.models.save import save_model
from tests.integration.runs import make_run
from tests.models_for_tests import (
    CAUSAL,
    ELECTRA,
    MODERN,
    TEXT_MODELS,
    VISION,
    causal,
    hf_vit,
    images,
    outputs,
    text_model,
    text_outputs,
    timm_vit,
)

QUICK = ["--trainer.accelerator", "cpu", "--logger", "none"]
MODELS = {
    "timm": (timm_vit, outputs),
    "timm, LayerScale, registers": (lambda: timm_vit(init_values=0.5, reg_tokens=3), outputs),
    "vit": (hf_vit, outputs),
    **{name: (lambda name=name: text_model(name), text_outputs) for name in TEXT_MODELS},
    **{name: (lambda name=name: causal(name), text_outputs) for name in CAUSAL},
    **{name: (lambda build=build: build(0), outputs) for name, build in VISION.items()},
    **{name: (lambda build=build: build(0), text_outputs) for name, build in (ELECTRA | MODERN).items()},
}


@pytest.fixture
def parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two ViTs, of which the library knows nothing."""
    found = [str(make_run(tmp_path / f"seed-{seed}", seed)) for seed in (1, 2)]
    monkeypatch.setattr("fusionpl.families.family.library", dict)
    return found


def refused(capsys: pytest.CaptureFixture[str], command, argv: list[str]) -> str:
    assert main(command, argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


# Drafts of these have to be mended.
MENDED = (
    "opt, post-LN", "opt classifier, post-LN", "phi3, groups, partly rotary", "phi3 classifier", "timm, one map",
    "timm, two of each",
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name in MODELS if name not in MENDED])
def test_drafts_hold_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusionpl.families.family.library", dict)
    build, run = MODELS[name]
    model = build()
    own = parse_family(draft(model, run))
    assert permutation_error(model, run, family=own) < 1e-4


@pytest.mark.parametrize(
    "name", ["timm", "timm, distilled", "vit", "bert masked-lm", "distilbert masked-lm", "gpt2", "gpt_neox", "llama",
             "llama, biases", "qwen3", "gemma", "gemma2", "gemma3", "electra masked-lm, small"]
)  # fmt: skip
def test_a_draft_says_what_the_library_says(name: str) -> None:
    build, run = MODELS[name]
    model = build()
    found, known = bind(model, parse_family(draft(model, run))), bind(model)
    assert (found.axes, found.joins, found.circuits, found.gates) == (
        known.axes, known.joins, known.circuits, known.gates
    )  # fmt: skip
    assert places(found) == places(known)
    assert (found.family.norm, found.family.offset) == (known.family.norm, known.family.offset)
    assert [slot.rooted for slot in found.slots] == [slot.rooted for slot in known.slots]
    assert readers(found, model) == readers(known, model)


def places(binding: Binding) -> dict[str, tuple[str, str]]:
    return {axis: (tap.target, tap.kind) for axis, tap in binding.taps.items()}


def readers(binding: Binding, model: nn.Module) -> dict[str, list[str]]:
    """Norm -> what reads it, of those that the model has."""
    have = {name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        prefix + norm: [prefix + one for one in read if prefix + one in have]
        for _, prefix, part in binding.family.sections(binding.depths)
        for norm, read in part.norms.items()
        if prefix + norm in have
    }


def test_a_draft_is_all_that_the_commands_need(
    parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no family for timm" in refused(capsys, fuse.run, ["--parents", *parents, *QUICK])
    own = str(tmp_path / "my.yaml")
    assert main(family.run, [parents[0], "--output", own]) == 0
    assert f"{own} holds: " in capsys.readouterr().out
    assert main(family.run, [parents[1], "--family", own]) == 0
    capsys.readouterr()
    argv = ["--parents", *parents, "--family", own, *QUICK]
    assert main(fuse.run, [*argv, "--check"]) == 0
    assert "seed-2: ok" in capsys.readouterr().out
    output = tmp_path / "fused"
    assert main(fuse.run, [*argv, "--output", str(output)]) == 0
    assert yaml.safe_load((output / "config.yaml").read_text())["family"] == own
    grid = ["--sweep", "align.solver=emd,sinkhorn", "--output", str(tmp_path / "sweep")]
    assert main(sweep.run, [*argv, *grid]) == 0


def test_a_draft_is_printed(parents: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(family.run, [parents[0]]) == 0
    text = capsys.readouterr().out
    assert parse_family(text).stacks[0].block.path == "blocks.{l}"  # the line with the proof is a comment
    assert "# the draft holds: " in text
    assert "# guess: " in text


def test_what_is_wrong_is_told(parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "my.yaml"
    assert main(family.run, [parents[0], "--output", str(own)]) == 0
    text = own.read_text()
    assert "exists; replace it with --overwrite" in refused(capsys, family.run, [parents[0], "--output", str(own)])
    for old, new, message in (
        ("    mlp.fc1.bias: ffn\n", "", "no pattern matches parameter 'blocks.0.mlp.fc1.bias' [32]"),
        ("ffn: mlp.fc1", "ffn: mlp.fc2", "axis 'blocks.0.ffn' has neither tap nor join"),
        ("(head q)|(head k)|(head v)", "(head q)|(head v)|(head k)", "moving units at random changes outputs by"),
        ("norm1: [attn.qkv]", "norm1: [mlp.fc1]", "folding norms into what reads them, and scales, changes outputs by"),
        ("mlp <- ffn", "mlp <- ffn)", "block.parameters.mlp.fc2.weight: 'mlp <- ffn)': unbalanced parenthesis"),
        ("sizes: {head: blocks.0.attn.num_heads}", "sizes: {head: blocks.0.heads}", "the model has no blocks.0.heads"),
    ):
        assert old in text
        own.write_text(text.replace(old, new))
        summary = refused(capsys, family.run, [parents[0], "--family", str(own)])
        assert f"error: {own}: " in summary
        assert message in summary
    assert "there is no family file nowhere.yaml" in refused(
        capsys, fuse.run, ["--parents", *parents, "--family", "nowhere.yaml", *QUICK]
    )


def test_mistakes(parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no model at" in refused(capsys, family.run, [str(tmp_path / "none")])
    assert "unknown option --outptu; did you mean 'output'?" in refused(
        capsys, family.run, [parents[0], "--outptu", "x"]
    )
    assert "model" in refused(capsys, family.run, [])


def test_a_language_model_from_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(causal("llama"), tmp_path / "model")
    assert main(family.run, [str(tmp_path / "model"), "--output", str(tmp_path / "my.yaml")]) == 0
    assert "my.yaml holds: " in capsys.readouterr().out


class Doubled(nn.RMSNorm):
    """It multiplies by twice its weight and a little more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2 + x * 0.1


def test_a_gain_that_is_no_plain_factor_is_not_folded() -> None:
    model: Any = causal("llama")
    for layer in model.model.layers:
        layer.input_layernorm = Doubled(16)
    text = draft(model, text_outputs)
    assert "norms: {input_layernorm: [], post_attention_layernorm: [mlp.gate_proj, mlp.up_proj]}" in text
    assert "its gain is no plain factor, so it stays where it is" in text


def test_a_draft_sees_what_norms_add_and_embeddings_multiply() -> None:
    text = draft(causal("gemma"), text_outputs)
    assert "offset: 1\n" in text
    assert "rooted: [model.embed_tokens]" in text
    assert "norms: {input_layernorm: [self_attn.q_proj, self_attn.k_proj, self_attn.v_proj]" in text
    plain = draft(causal("llama"), text_outputs)
    assert "offset" not in plain
    assert "rooted" not in plain


def test_several_stacks_have_no_draft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
    )  # fmt: skip
    save_model(BartForConditionalGeneration(config), tmp_path / "model")
    own = tmp_path / "my.yaml"
    line = refused(capsys, family.run, [str(tmp_path / "model"), "--output", str(own)])
    assert "has several stacks of blocks (model.decoder.layers, model.encoder.layers)" in line
    assert not own.exists()


def test_a_network_without_blocks_has_no_draft() -> None:
    with pytest.raises(Exception, match="Linear has no list of blocks that are alike"):
        draft(nn.Linear(2, 2), lambda model: logits(model, {}))


def test_blocks_with_names_of_their_own() -> None:
    """torchvision calls its blocks `encoder_layer_0`; its attention shows no queries."""
    model = torchvision.models.VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12
    ).eval()
    words = "'encoder.layers.encoder_layer_0.self_attention' is torch's MultiheadAttention"
    with pytest.raises(FusionError, match=words):
        job.drafted(model, job.random_batch(model))
    vit = timm_vit()
    vit.blocks = nn.Sequential(OrderedDict((f"block_{index}", one) for index, one in enumerate(vit.blocks)))  # type: ignore[arg-type]
    text = job.drafted(vit, images(4))
    assert "path: blocks.block_{l}" in text
    assert "holds" in job.proof(vit, parse_family(text), images(4), "draft")
    vit.blocks = nn.Sequential(OrderedDict(zip("ab", vit.blocks, strict=True)))  # type: ignore[arg-type]
    with pytest.raises(FusionError, match="the blocks of blocks are called a, b, and a family tells them apart by"):
        job.drafted(vit, images(4))
