"""Adapters of peft as parents: merged into their base as they are read."""

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fusionpl import fuse, load_config, load_model
from fusionpl.errors import FusionError
from fusionpl.models.opened import open_model
from fusionpl.models.save import save_model
from fusionpl.models.tokenizers import load_tokenizer, train_wordpiece
from tests import hub
from tests.integration.runs import WORDS
from tests.models_for_tests import hf_vit, images, largest_difference, outputs, redrawn, sentences, text_model

LLAMA: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
NO_REFINE = {"align.solver": "emd", "refit.method": "none"}


def llama(seed: int = 0) -> Any:
    return redrawn(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)), seed)


def adapt(base: Any, folder: Path, place: str, *, seed: int = 5, kind: Any = peft.LoraConfig, **settings: Any) -> Any:
    """Saves an adapter with weights that change something; returns the model that peft makes of it."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    model: Any = peft.get_peft_model(base, kind(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    about = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(about | {"base_model_name_or_path": place}))
    return model.eval()


def logits_of(model: nn.Module, batch: dict[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**(batch or sentences(6))).logits
    return found


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_model(llama(), tmp_path / "base", tokenizer=train_wordpiece([" ".join(WORDS)] * 3, 60))
    return tmp_path / "base"


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"},
     {"target_modules": ["embed_tokens", "down_proj"]}],
    ids=["lora", "dora", "rslora", "modules to save", "bias", "embedding"],
)  # fmt: skip
def test_an_adapter_is_what_peft_makes_of_it(settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    wanted = logits_of(adapt(llama(), tmp_path / "lora", str(base), **settings))
    assert open_model(tmp_path / "lora") is None
    model = load_model(tmp_path / "lora")
    assert type(model) is transformers.LlamaForCausalLM
    assert model.state_dict().keys() == llama().state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(logits_of(model), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wanted, logits_of(llama()), atol=1e-2)


@pytest.mark.parametrize("place", ["../base", "base"])
def test_the_base_may_be_named_from_the_adapters_folder(
    place: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "lora"
    (tmp_path / "elsewhere" / "here" / "base").mkdir(parents=True)  # where the command is run, and no model
    (tmp_path / "elsewhere" / "base").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere" / "here")
    wanted = logits_of(adapt(llama(), where, place))
    if place == "base":
        base.rename(where / "base")
    torch.testing.assert_close(logits_of(load_model(where)), wanted, rtol=1e-4, atol=1e-4)
    assert load_tokenizer(where) is not None


def test_a_base_in_shards(base: Path, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    wanted = logits_of(adapt(llama(), tmp_path / "lora", "../shards"))
    torch.testing.assert_close(logits_of(load_model(tmp_path / "lora")), wanted, rtol=1e-4, atol=1e-4)


def test_the_tokenizer_is_the_adapters_if_it_has_one(base: Path, tmp_path: Path) -> None:
    adapt(llama(), tmp_path / "lora", str(base))
    found = load_tokenizer(tmp_path / "lora")
    assert found is not None
    assert found.get_vocab() == load_tokenizer(base).get_vocab()  # type: ignore[union-attr]
    train_wordpiece(["zebra zebra zebra"], 60).save_pretrained(tmp_path / "lora")
    own = load_tokenizer(tmp_path / "lora")
    assert own is not None
    assert own.get_vocab() != found.get_vocab()


@pytest.mark.parametrize("anchor", [0, 1])
def test_the_fused_model_is_an_ordinary_one(anchor: int, base: Path, tmp_path: Path) -> None:
    save_model(llama(3), tmp_path / "other", tokenizer=load_tokenizer(base))
    adapt(llama(), tmp_path / "lora", "../base")
    config = load_config(None, NO_REFINE | {"anchor": anchor})
    parents = [tmp_path / "lora", tmp_path / "other"]
    result = fuse(parents, [sentences()], config, output=tmp_path / "fused")
    wanted = fuse([load_model(one) for one in parents], [sentences()], config)
    assert largest_difference(result.model, wanted.model) < 1e-5
    folder = tmp_path / "fused/model"
    assert not list(folder.glob("adapter*"))
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert largest_difference(load_model(folder), result.model) < 1e-5
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(base).get_vocab()  # type: ignore[union-attr]
    assert largest_difference(transformers.AutoModelForCausalLM.from_pretrained(folder), result.model) < 1e-5


def test_an_adapter_of_a_fused_run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(llama(3), tmp_path / "other")
    fused = fuse(
        [base, tmp_path / "other"], [sentences()], load_config(None, NO_REFINE), output=tmp_path / "runs/fused"
    )
    monkeypatch.chdir(tmp_path)
    wanted = logits_of(adapt(fused.model, tmp_path / "lora", "runs/fused"))
    torch.testing.assert_close(logits_of(load_model("lora")), wanted, rtol=1e-4, atol=1e-4)


# heads


@pytest.mark.parametrize("labels", [2, 3])
def test_an_adapter_with_a_classifier_on_an_encoder(labels: int, tmp_path: Path) -> None:
    sizes = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    config = transformers.BertConfig(**sizes, max_position_embeddings=20)
    redrawn(transformers.BertForPreTraining(config), 1).save_pretrained(tmp_path / "base")
    cls: Any = transformers.BertForSequenceClassification
    start = cls.from_pretrained(tmp_path / "base", num_labels=labels)
    wanted = logits_of(adapt(start, tmp_path / "lora", "../base", target_modules=["query"], task_type="SEQ_CLS"))
    model = load_model(tmp_path / "lora")
    assert type(model) is cls
    assert wanted.shape == (6, labels)
    torch.testing.assert_close(logits_of(model), wanted, rtol=1e-4, atol=1e-4)
    again = load_file(tmp_path / "lora/adapter_model.safetensors")
    kept = {name: tensor for name, tensor in again.items() if "classifier" not in name}
    save_file(kept, tmp_path / "lora/adapter_model.safetensors")
    with pytest.raises(FusionError, match=r"model\.safetensors lacks classifier\.bias"):
        load_model(tmp_path / "lora")


def test_an_adapter_of_a_vit_with_other_classes(tmp_path: Path) -> None:
    hf_vit(1).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    cls: Any = transformers.ViTForImageClassification
    start = cls.from_pretrained(tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True)
    settings = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"], "task_type": None}
    wanted = adapt(start, tmp_path / "lora", "../base", **settings)
    with torch.no_grad():
        seen = wanted(pixel_values=images(16, seed=99)).logits
    torch.testing.assert_close(outputs(load_model(tmp_path / "lora")), seen, rtol=1e-4, atol=1e-4)


# mistakes


def test_without_peft_the_line_says_how_to_install_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapt(llama(), tmp_path / "lora", str(base))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    with pytest.raises(FusionError, match=r"lora holds an adapter, which peft reads: pip install 'fusionpl\[peft\]'$"):
        load_model(tmp_path / "lora")


def about(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base_model_name_or_path": "/nowhere/base"}, r"base of the adapter in \S+lora: no model at /nowhere/base; "),
        ({"base_model_name_or_path": None}, r"adapter_config\.json names no base; set base_model_name_or_path"),
        ({"base_model_name_or_path": "../lora"}, r"the base of the adapter in \S+lora is an adapter itself"),
        ({"peft_type": "NEWEST"}, r"lora/adapter_config\.json: peft can't read it: "),
        ({"r": 3}, r"lora: the adapter doesn't fit LlamaForCausalLM: size mismatch for "),
        ({"target_modules": ["q_proj"]}, r"fit LlamaForCausalLM: it holds model\.layers\.\S+v_proj"),
        ({"target_modules": ["nothing"]}, r"the adapter doesn't fit LlamaForCausalLM: .*nothing"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, r"it lacks model\.layers\.\S+o_proj"),
        ({"megatron_config": {"x": 1}}, r"is for Megatron's modules"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(settings: dict[str, Any], words: str, base: Path, tmp_path: Path) -> None:
    adapt(llama(), tmp_path / "lora", str(base))
    about(tmp_path / "lora", **settings)
    with pytest.raises(FusionError, match=words) as caught:
        load_model(tmp_path / "lora")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_config(text: str, base: Path, tmp_path: Path) -> None:
    adapt(llama(), tmp_path / "lora", str(base))
    (tmp_path / "lora/adapter_config.json").write_text(text)
    with pytest.raises(FusionError, match=r"adapter_config\.json (is damaged|names no base)"):
        load_model(tmp_path / "lora")


def test_a_prompt_cannot_be_merged(base: Path, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model: Any = peft.get_peft_model(llama(), config)
    model.save_pretrained(tmp_path / "prompt")
    about(tmp_path / "prompt", base_model_name_or_path="../base")
    with pytest.raises(FusionError, match=r"prompt: PROMPT_TUNING changes no weights, so it can't be merged"):
        load_model(tmp_path / "prompt")


def test_a_pickle_only_where_it_is_allowed(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    wanted = logits_of(adapt(llama(), folder, str(base)))
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FusionError, match=r"no adapter_model\.safetensors; adapter_model\.bin is a pickle: --allow-p"):
        load_model(folder)
    torch.testing.assert_close(logits_of(load_model(folder, allow_pickle=True)), wanted, rtol=1e-4, atol=1e-4)

    class Trap:
        def __reduce__(self) -> Any:
            return os.system, (f"touch '{tmp_path / 'trapped'}'",)

    torch.save({"x": Trap()}, folder / "adapter_model.bin")
    with pytest.raises(FusionError, match=r"adapter_model\.bin is damaged, or holds more than tensors"):
        load_model(folder, allow_pickle=True)
    assert not (tmp_path / "trapped").exists()


# beside a whole model


def test_an_adapter_beside_a_whole_model_is_told_and_stays_behind(base: Path, tmp_path: Path) -> None:
    adapt(llama(), tmp_path / "lora", str(base))
    save_model(llama(3), tmp_path / "other", tokenizer=load_tokenizer(base))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "other" / name).write_bytes((tmp_path / "lora" / name).read_bytes())
    words = r"other holds a whole model, which is taken as it is, and an adapter, which is not applied; to merge that"
    with pytest.warns(UserWarning, match=words):
        assert largest_difference(load_model(tmp_path / "other"), llama(3)) == 0
    config = load_config(None, NO_REFINE)
    with pytest.warns(UserWarning, match=words):
        result = fuse([tmp_path / "other", base], [sentences()], config, output=tmp_path / "fused")
    assert [line for line in result.warnings if "which is not applied" in line]
    assert not list((tmp_path / "fused").rglob("adapter*"))
    wanted = fuse([llama(3), llama()], [sentences()], config)
    assert largest_difference(load_model(tmp_path / "fused"), wanted.model) < 1e-5


# on the hub


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[hub.Hub]:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with hub.serving({}, monkeypatch, tmp_path / "cache") as stand_in:
        yield stand_in


def test_adapter_and_base_on_the_hub(
    serve: hub.Hub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = logits_of(adapt(llama(), tmp_path / "lora", "org/base"))
    about(tmp_path / "lora", revision="step2")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/adapter_config.json").write_bytes((tmp_path / "lora/adapter_config.json").read_bytes())
    torch.save(load_file(tmp_path / "lora/adapter_model.safetensors"), tmp_path / "old/adapter_model.bin")
    save_model(text_model("bert masked-lm"), tmp_path / "wrong")
    serve.repos = {
        "org/base": {"main": tmp_path / "wrong", "step2": base},
        "org/lora": {"main": tmp_path / "lora", "old": tmp_path / "old"},
    }
    assert load_tokenizer("org/lora") is not None
    assert not any(name.endswith("safetensors") for name in serve.downloads)
    with pytest.raises(
        FusionError, match=r"'org/lora@old' is an adapter without adapter_model\.safetensors; if it has"
    ):
        load_model("org/lora@old")
    assert "adapter_model.bin" not in serve.downloads
    for _ in range(2):
        torch.testing.assert_close(logits_of(load_model("org/lora")), wanted, rtol=1e-4, atol=1e-4)
        found = load_model("org/lora@old", allow_pickle=True)
        torch.testing.assert_close(logits_of(found), wanted, rtol=1e-4, atol=1e-4)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
