"""What ties embedding and decoder: the class, config.json and the files may disagree."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fusionpl import fuse, load_config, load_model
from fusionpl.errors import FusionError
from fusionpl.models.opened import open_model
from fusionpl.models.resized import resized
from fusionpl.models.save import save_model
from tests.models_for_tests import redrawn, sentences, text_model

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 20, "pad_token_id": 0,
}  # fmt: skip
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 20, "eos_token_id": 1,
        "bos_token_id": 1}  # fmt: skip
BUILD: dict[str, Callable[[bool], nn.Module]] = {
    "t5": lambda tied: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**T5, decoder_start_token_id=0, tie_word_embeddings=tied)
    ),
    "gpt2": lambda tied: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, tie_word_embeddings=tied)),
    "llama": lambda tied: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)),
    "bert": lambda tied: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, tie_word_embeddings=tied)),
}
ENDS = {
    "t5": ("shared.weight", "lm_head.weight"),
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
    "llama": ("model.embed_tokens.weight", "lm_head.weight"),
    "bert": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
}


def laid_out(folder: Path, kind: str, *, tied: bool, held: str, dtype: torch.dtype = torch.float32) -> Path:
    """A model folder whose config says `tied`, and whose file holds the embedding, the decoder, or both."""
    redrawn(BUILD[kind](tied), 1).to(dtype).save_pretrained(folder)  # type: ignore[operator]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    state = load_file(folder / "model.safetensors")
    noise = 0.2 * torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    first, last = ENDS[kind]
    values = {"embedding": (noise[0], None), "decoder": (None, noise[0]), "equal": (noise[0], noise[0].clone()),
              "different": (noise[0], noise[1])}[held]  # fmt: skip
    kept = {name: tensor for name, tensor in state.items() if name not in (first, last)}
    kept |= {name: tensor for name, tensor in zip((first, last), values, strict=True) if tensor is not None}
    save_file({name: tensor.contiguous() for name, tensor in kept.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    return folder


def batch_of(kind: str, count: int = 24) -> dict[str, Tensor]:
    found = sentences(count)
    return found | {"decoder_input_ids": sentences(count, 3)["input_ids"]} if kind == "t5" else found


@pytest.mark.parametrize("held", ["embedding", "decoder", "equal", "different"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", BUILD)
def test_by_path_is_what_transformers_reads(kind: str, tied: bool, held: str, tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "model", kind, tied=tied, held=held)
    if not tied and held in ("embedding", "decoder") and kind != "t5":
        for read in (load_model, open_model):
            with pytest.raises(FusionError, match=r"model\.safetensors lacks "):
                read(folder)
        return
    model, opened = load_model(folder), open_model(folder)
    assert opened is not None
    wanted = dict(model.named_parameters(remove_duplicate=False))
    assert wanted.keys() == opened.names.keys()
    for name, tensor in wanted.items():
        assert torch.equal(opened.read(name), tensor), name
    first, last = (opened.module.get_parameter(name) for name in ENDS[kind])
    assert (first is last) == (held != "different" and not (held == "equal" and not tied and kind != "t5"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", BUILD)
def test_a_model_fused_with_itself_by_path_is_the_model(kind: str, tied: bool, tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "model", kind, tied=tied, held="different")
    config = load_config(None, {"align.solver": "emd"})
    result = fuse([folder, folder], [batch_of(kind)], config, names=["a", "b"], output=tmp_path / "fused")
    batch = batch_of(kind, 6)
    with torch.no_grad():
        wanted: Tensor = load_model(folder)(**batch).logits  # type: ignore[assignment]
        for model in (result.model, load_model(tmp_path / "fused")):
            found: Tensor = model(**batch).logits  # type: ignore[assignment]
            assert float((found - wanted).abs().max()) <= 1e-3 * float(wanted.abs().max())


def test_the_layout_of_t5_v1_1_in_bfloat16(tmp_path: Path) -> None:
    folders = [laid_out(tmp_path / name, "t5", tied=False, held="different", dtype=torch.bfloat16) for name in "ab"]
    result = fuse(folders, [batch_of("t5")], load_config(None, {"align.solver": "emd"}), output=tmp_path / "fused")
    own: Any = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "fused/model", dtype=torch.float32)
    state = load_file(tmp_path / "fused/model/model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert {"shared.weight", "lm_head.weight"} <= state.keys()
    assert not own.config.scale_decoder_outputs
    batch = batch_of("t5", 6)
    with torch.no_grad():
        wanted, found = load_model(folders[0])(**batch).logits, own.eval()(**batch).logits
        assert float((found - wanted).abs().max()) <= 0.02 * float(wanted.abs().max())
        assert torch.equal(result.model(**batch).logits, found)


def test_what_the_files_take_apart_stays_apart_at_another_depth(tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "model", "llama", tied=True, held="different")
    model = resized(load_model(folder), depth=3)
    assert model.get_parameter("lm_head.weight") is not model.get_parameter("model.embed_tokens.weight")
    whole = resized(load_model(laid_out(tmp_path / "tied", "llama", tied=True, held="embedding")), depth=3)
    assert whole.get_parameter("lm_head.weight") is whole.get_parameter("model.embed_tokens.weight")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_quantised_weights_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    name = "bert.encoder.layer.1.output.dense.weight"
    save_model(text_model("bert masked-lm"), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state[name] = (10 * state[name]).to(dtype)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    kind = str(dtype).removeprefix("torch.")
    for read in (load_model, open_model):
        with pytest.raises(FusionError, match=rf"model\.safetensors: {name} is quantised \({kind}\); dequantise"):
            read(tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("strategy", ["transport", "joint"])
def test_tied_beside_untied(kind: str, first: bool, strategy: str, tmp_path: Path) -> None:
    """A tied decoder comes apart, so that both have two matrices; all weight on one gives that one."""
    parents: list[Any] = [redrawn(BUILD[kind](tied), seed) for seed, tied in enumerate((first, not first))]
    for index, parent in enumerate(parents):
        save_model(parent, tmp_path / str(index))
    exact: dict[str, Any] = {
        "strategy": "transport", "weights": [0.0, 1.0], "align.solver": "emd", "align.residual": "tie",
        "align.qk": "shared", "align.heads": "matched", "refit.method": "none",
    }  # fmt: skip
    config = load_config("default", exact if strategy == "transport" else {"strategy": "joint"})
    folders = [tmp_path / "0", tmp_path / "1"]
    found = fuse(folders, [sentences()], config, output=tmp_path / "fused")
    assert not found.model.config.tie_word_embeddings  # type: ignore[union-attr]
    assert any("no longer embedding and decoder in one" in line for line in found.warnings) == first
    mask = sentences()["attention_mask"].bool()
    with torch.no_grad():
        loaded = load_model(tmp_path / "fused")(**sentences()).logits[mask]
        torch.testing.assert_close(loaded, found.model(**sentences()).logits[mask])
        if strategy == "transport":
            torch.testing.assert_close(loaded, parents[1](**sentences()).logits[mask], atol=1e-4, rtol=1e-4)


def test_a_tie_that_stays_is_one_line() -> None:
    """T5 scales by the tie, so it does not come apart."""
    tied, untied = BUILD["t5"](True), BUILD["t5"](True)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())  # type: ignore[union-attr,operator]
    with pytest.raises(FusionError) as caught:
        fuse([tied, untied], [])
    assert str(caught.value) == (
        "parents tied and untied: 'shared.weight' is embedding and decoder in one in parent 0, and not in parent 1; "
        "take two that are alike"
    )
