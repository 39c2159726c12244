"""Checkpoints as they are published: sharded, half precision, old names, leftovers, pickles."""

import json
import os
import pickle
import re
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
from fusionpl.families.binding import bind
from fusionpl.models.build import build_model
from fusionpl.models.config import ModelConfig
from fusionpl.models.heads import with_classifier
from fusionpl.models.opened import open_model
from fusionpl.models.save import save_model
from tests.models_for_tests import largest_difference, redrawn, sentences, text_model

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 20, "pad_token_id": 0,
}  # fmt: skip
VIT = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
INDEX = "model.safetensors.index.json"


def bert(name: str, seed: int = 0) -> nn.Module:
    return redrawn(getattr(transformers, name)(transformers.BertConfig(**SIZES)), seed)


def masked(seed: int = 0) -> nn.Module:
    return text_model("bert masked-lm", seed)


def timm_vit(seed: int = 0) -> nn.Module:
    return redrawn(build_model(ModelConfig(args=VIT), num_classes=3), seed)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def same(folder: Path, model: nn.Module, **options: bool) -> None:
    """Checks that both ways of reading give a model's parameters."""
    assert largest_difference(load_model(folder, **options), model) == 0
    opened = open_model(folder, **options)
    assert opened is not None
    wanted = dict(model.named_parameters(remove_duplicate=False))
    assert wanted.keys() == opened.names.keys()
    for name, tensor in wanted.items():
        assert torch.equal(opened.read(name), tensor), name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


@pytest.fixture
def sharded(folder: Path) -> Path:
    masked().save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def test_shards_are_one_model(sharded: Path) -> None:
    same(sharded, masked())


def test_a_shard_that_no_index_names_is_not_read(sharded: Path) -> None:
    stale = {name: torch.full_like(tensor, 7) for name, tensor in masked().state_dict().items()}
    save_file({name: tensor.clone() for name, tensor in stale.items()}, sharded / "model-00099-of-00099.safetensors")
    same(sharded, masked())


def test_a_single_file_comes_before_an_index_as_in_transformers(sharded: Path, tmp_path: Path) -> None:
    save_model(masked(1), tmp_path / "single")
    (tmp_path / "single/model.safetensors").rename(sharded / "model.safetensors")
    same(sharded, masked(1))


def remove(folder: Path, name: str) -> None:
    (folder / name).unlink()


def rewrite_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda folder: remove(folder, sorted(file.name for file in folder.glob("model-*"))[1]),
            rf"model-00002-of-\d+\.safetensors is missing, but {INDEX} names it; copy or download it too$",
        ),
        (lambda folder: remove(folder, INDEX), rf"has no model\.safetensors, and its shards have no {INDEX}; copy"),
        (lambda folder: (folder / INDEX).write_text("{"), rf"{INDEX} is damaged"),
        (lambda folder: (folder / INDEX).write_text("{}"), rf"{INDEX} is damaged"),
        (
            lambda folder: rewrite_index(folder, lambda names: names.update(x=next(iter(names.values())))),
            rf"model-\S+ lacks x, which {INDEX} says it has",
        ),
        (
            lambda folder: rewrite_index(folder, lambda names: names.pop("bert.encoder.layer.1.output.dense.bias")),
            rf"{INDEX} lacks bert\.encoder\.layer\.1\.output\.dense\.bias",
        ),
    ],
)
def test_damaged_shards_are_one_line(sharded: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(sharded)
    with pytest.raises(FusionError, match=words) as caught:
        open_model(sharded)
    assert str(sharded) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("build", [masked, timm_vit], ids=["transformers", "timm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_until_a_whole_model_is_loaded(
    build: Callable[[], nn.Module], dtype: torch.dtype, folder: Path
) -> None:
    save_model(build().to(dtype), folder)
    opened = open_model(folder)
    assert opened is not None
    assert {parameter.dtype for parameter in opened.module.parameters()} == {dtype}
    assert {opened.read(name).dtype for name in opened.names} == {dtype}
    loaded = load_model(folder)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert largest_difference(loaded, build().to(dtype).float()) == 0


def neox(seed: int = 0) -> nn.Module:
    return redrawn(transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES)), seed)


def neox_leftovers(state: dict[str, Tensor]) -> None:
    for layer in range(2):
        prefix = f"gpt_neox.layers.{layer}.attention"
        state[f"{prefix}.bias"] = torch.ones(1, 1, 20, 20, dtype=torch.bool)
        state[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
        state[f"{prefix}.rotary_emb.inv_freq"] = torch.ones(1)


def bert_leftovers(state: dict[str, Tensor]) -> None:
    state["bert.embeddings.position_ids"] = torch.arange(20)[None]


def old_names(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if "LayerNorm" in name]:
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        state[old] = state.pop(name)
    bert_leftovers(state)


@pytest.mark.parametrize(
    ("build", "edit"),
    [
        (neox, neox_leftovers),
        (masked, bert_leftovers),
        (lambda: bert("BertForPreTraining"), old_names),
    ],
    ids=["GPT-NeoX's masks", "BERT's positions", "BERT's names of 2019"],
)
def test_leftovers_and_old_names(
    build: Callable[[], nn.Module], edit: Callable[[dict[str, Tensor]], None], folder: Path
) -> None:
    save_model(build(), folder)
    change(folder, edit)
    same(folder, build())


def test_old_names_are_fused_by_path(tmp_path: Path) -> None:
    parents = [bert("BertForPreTraining", seed) for seed in (1, 2)]
    for index, parent in enumerate(parents):
        save_model(parent, tmp_path / str(index))
        change(tmp_path / str(index), old_names)
    options = load_config(None, {"align.solver": "emd"})
    whole = fuse(parents, [sentences()], options).model
    by_path = fuse([tmp_path / "0", tmp_path / "1"], [sentences()], options, output=tmp_path / "fused")
    assert largest_difference(whole, by_path.model) < 1e-5
    assert "bert.embeddings.position_ids" not in load_file(tmp_path / "fused/model/model.safetensors")


def declared(folder: Path, name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [name]}))


def test_a_head_that_the_class_has_not_is_left_out(folder: Path) -> None:
    save_model(bert("BertForPreTraining"), folder)
    declared(folder, "BertForMaskedLM")
    opened = open_model(folder)
    assert opened is not None
    assert not any("seq_relationship" in name or "pooler" in name for name in opened.names)
    assert type(load_model(folder)).__name__ == "BertForMaskedLM"


def test_a_head_that_is_not_there_is_refused(folder: Path) -> None:
    save_model(bert("BertModel"), folder)
    declared(folder, "BertForMaskedLM")
    for read in (load_model, open_model):
        with pytest.raises(FusionError, match=r"model\.safetensors lacks cls\.predictions\."):
            read(folder)


@pytest.mark.parametrize("pooler", [True, False])
def test_an_encoder_without_a_head_takes_a_classifier(folder: Path, pooler: bool) -> None:
    encoder = redrawn(transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=pooler), 1)
    save_model(encoder, folder)
    same(folder, encoder)
    classifier = with_classifier(load_model(folder), 3, None, seed=0)
    assert type(classifier).__name__ == "BertForSequenceClassification"
    found: Any = classifier
    assert all(torch.equal(tensor, found.bert.get_parameter(name)) for name, tensor in encoder.named_parameters())
    assert bind(encoder).family.name == "bert"  # what stands in the models that have a head


def test_a_class_that_no_family_knows_is_told_its_neighbours() -> None:
    model = transformers.BertForTokenClassification(transformers.BertConfig(**SIZES))
    with pytest.raises(FusionError, match="no family for BertForTokenClassification, but for BertForMaskedLM, "):
        bind(model)


def pickled(folder: Path, build: Callable[[], nn.Module], *, legacy: bool = False, shards: int = 0) -> Path:
    save_model(build(), folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if not shards:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        return folder
    names = sorted(state)
    places = {name: f"pytorch_model-{number % shards:05}-of-{shards:05}.bin" for number, name in enumerate(names)}
    for place in set(places.values()):
        torch.save({name: state[name] for name in names if places[name] == place}, folder / place)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("build", [masked, timm_vit], ids=["transformers", "timm"])
@pytest.mark.parametrize("layout", [{}, {"legacy": True}, {"shards": 3}], ids=["zip", "legacy", "shards"])
def test_pickles_are_read_where_they_are_allowed(
    build: Callable[[], nn.Module], layout: dict[str, Any], folder: Path
) -> None:
    pickled(folder, build, **layout)
    same(folder, build(), allow_pickle=True)
    for read in (load_model, open_model):
        with pytest.raises(
            FusionError, match=r"has no model\.safetensors; pytorch_model\S*\.bin is a pickle: --allow-pi"
        ):
            read(folder)


def test_safetensors_come_before_pickles(folder: Path) -> None:
    pickled(folder, lambda: masked(1))
    state = masked(2).state_dict()
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors")
    same(folder, masked(2), allow_pickle=True)


class Trap:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.file}'",)


@pytest.mark.parametrize("build", [masked, timm_vit], ids=["transformers", "timm"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(
    build: Callable[[], nn.Module], folder: Path, tmp_path: Path
) -> None:
    pickled(folder, build)
    for write in (
        lambda file: torch.save({"x": Trap(tmp_path / "trapped")}, file),
        lambda file: file.write_bytes(pickle.dumps({"x": Trap(tmp_path / "trapped")}, protocol=2)),
    ):
        write(folder / "pytorch_model.bin")
        for read in (load_model, open_model):
            with pytest.raises(
                FusionError, match=r"pytorch_model\.bin is damaged, or holds more than tensors"
            ) as caught:
                read(folder, allow_pickle=True)
            assert "\n" not in str(caught.value)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"epoch": 3}, r"pytorch_model\.bin is no table of tensors"),
        ([torch.ones(2)], r"pytorch_model\.bin is no table of tensors"),
        ({"x": torch.ones(2)}, r"pytorch_model\.bin lacks \S+"),
    ],
)
def test_a_pickle_of_something_else(folder: Path, content: object, words: str) -> None:
    pickled(folder, masked)
    torch.save(content, folder / "pytorch_model.bin")
    for read in (load_model, open_model):
        with pytest.raises(FusionError, match=words):
            read(folder, allow_pickle=True)


def test_a_truncated_pickle(folder: Path) -> None:
    file = pickled(folder, masked) / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(FusionError, match=rf"{re.escape(str(file))} is (truncated or )?damaged"):
        load_model(folder, allow_pickle=True)


def test_pickles_are_fused_by_path(tmp_path: Path) -> None:
    parents = [pickled(tmp_path / str(seed), lambda seed=seed: masked(seed)) for seed in (1, 2)]  # type: ignore[misc]
    with pytest.raises(FusionError, match="--allow-pickle"):
        fuse(parents, [sentences()])
    by_path = fuse(parents, [sentences()], allow_pickle=True, output=tmp_path / "fused")
    whole = fuse([masked(1), masked(2)], [sentences()])
    assert largest_difference(whole.model, by_path.model) < 1e-5
    assert not list((tmp_path / "fused").rglob("*.bin"))
