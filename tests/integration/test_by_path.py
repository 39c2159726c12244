"""Parents read from their folders, block by block, and the fused model written block by block."""

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer, models
from torch import Tensor, nn

import fusionpl
from fusionpl.calibration.forward import logits
from fusionpl.errors import FusionError
from fusionpl.fusion import refit, sections
from fusionpl.fusion.result import FusionResult
from fusionpl.models.load import load_model
from fusionpl.models.opened import open_model
from fusionpl.models.save import class_names, save_model
from fusionpl.models.tensors import TensorFile
from fusionpl.presets import CONF
from tests.integration.runs import make_run
from tests.models_for_tests import TEXT_MODELS, hf_vit, images, sentences, text_model

DEFAULT = CONF / "fuse" / "default.yaml"
ROTATION = {
    "align.stream": "rotation", "align.residual": "tie", "align.heads": "matched", "align.solver": "assignment",
}  # fmt: skip
KINDS = ("timm", "vit", *TEXT_MODELS)


def batch_of(kind: str, count: int = 24) -> dict[str, Tensor]:
    if kind == "timm":
        return {"pixel_values": torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(0))}
    return {"pixel_values": images(count)} if kind == "vit" else sentences(count)


def save(folder: Path, kind: str, seed: int, dtype: torch.dtype = torch.float32, **shards: Any) -> nn.Module:
    """Saves a parent and returns the model that its folder holds, in its own type."""
    if kind == "timm":
        model = load_model(make_run(folder, seed)).to(dtype)
        save_model(model, folder / "model")
        return model
    model = (hf_vit(seed) if kind == "vit" else text_model(kind, seed)).to(dtype)
    any_model: Any = model
    any_model.save_pretrained(folder / "model", **shards)
    return model


def pair(
    folder: Path, kind: str, dtype: torch.dtype = torch.float32, **shards: Any
) -> tuple[list[Path], list[nn.Module]]:
    """Two folders, and their models in memory."""
    paths = [folder / f"seed-{seed}" for seed in (1, 2)]
    return paths, [save(path, kind, seed, dtype, **shards) for seed, path in enumerate(paths, 1)]


def fused(parents: list[Any], kind: str, output: Path | None = None, **changes: Any) -> FusionResult:
    config = fusionpl.load_config(DEFAULT, {"align.solver": "emd", **changes})  # Sinkhorn at 0.02 takes longer
    return fusionpl.fuse(parents, [batch_of(kind)], config, output=output)


def state_of(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "model" / "model.safetensors")


def assert_same(folder: Path, expected: nn.Module) -> None:
    """The file holds the parameters of a model, in their types and to the bit."""
    names = open_model(folder)
    assert names is not None
    for name, tensor in expected.named_parameters():
        found = names.read(name)
        assert found.dtype == tensor.dtype, name
        assert torch.equal(found, tensor), name


def own_library(folder: Path, kind: str) -> nn.Module:
    """What the model's own library makes of the folder."""
    if kind == "timm":
        return timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    config = json.loads((folder / "model" / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    model, info = cls.from_pretrained(folder / "model", output_loading_info=True, local_files_only=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    found: nn.Module = model.float().eval()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_parents_by_path_give_the_model_of_parents_in_memory(kind: str, tmp_path: Path) -> None:
    paths, models = pair(tmp_path, kind)
    expected = fused(models, kind)
    result = fused(list(paths), kind, tmp_path / "fused")
    assert_same(tmp_path / "fused", expected.model)
    for axis, one in expected.maps.items():
        assert torch.equal(result.maps[axis].plan, one.plan)
    batch = batch_of(kind, 5)
    with torch.no_grad():
        wanted = logits(expected.model, batch)
        for model in (result.model, load_model(tmp_path / "fused"), own_library(tmp_path / "fused", kind)):
            torch.testing.assert_close(logits(model, batch), wanted, rtol=1e-6, atol=1e-6)
            assert not model.training
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fused", "seed-1", "seed-2"]
    assert sorted(path.name for path in (tmp_path / "fused").iterdir()) == ["config.yaml", "maps.safetensors", "model"]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("timm", torch.bfloat16), ("timm", torch.float16), ("vit", torch.float16), ("bert masked-lm", torch.bfloat16)],
)
def test_half_precision_stays_what_it_is(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    paths, models = pair(tmp_path, kind, dtype)
    expected = fused(models, kind)
    assert {tensor.dtype for tensor in expected.model.parameters()} == {dtype}
    fused(list(paths), kind, tmp_path / "fused")
    assert_same(tmp_path / "fused", expected.model)
    found = own_library(tmp_path / "fused", kind)
    batch = batch_of(kind, 5)
    with torch.no_grad():
        torch.testing.assert_close(logits(found, batch), logits(expected.model.float(), batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{"refit.method": "none"}, ROTATION, {"align.evidence": "weights"}, {"anchor": 1}],
                         ids=["no refit", "rotation", "weights", "anchor"])  # fmt: skip
def test_every_way_of_fusing_reads_and_writes_block_by_block(changes: dict[str, Any], tmp_path: Path) -> None:
    paths, models = pair(tmp_path, "timm")
    expected = fused(models, "timm", **changes)
    fused(list(paths), "timm", tmp_path / "fused", **changes)
    assert_same(tmp_path / "fused", expected.model)


@pytest.mark.parametrize("kind", ["vit", "bert masked-lm"])
def test_shards_with_an_index(kind: str, tmp_path: Path) -> None:
    paths, models = pair(tmp_path, kind, max_shard_size="10KB")
    assert len(list((paths[0] / "model").glob("model-*.safetensors"))) > 2
    assert (paths[0] / "model" / "model.safetensors.index.json").is_file()
    expected = fused(models, kind)
    fused(list(paths), kind, tmp_path / "fused")
    assert_same(tmp_path / "fused", expected.model)
    assert not list((tmp_path / "fused" / "model").glob("*.index.json")), "it names shards that are not there"
    batch = batch_of(kind, 5)
    with torch.no_grad():
        torch.testing.assert_close(
            logits(own_library(tmp_path / "fused", kind), batch), logits(expected.model, batch), rtol=1e-6, atol=1e-6
        )


def test_a_parent_by_path_beside_one_in_memory(tmp_path: Path) -> None:
    paths, models = pair(tmp_path, "timm")
    expected = fused(models, "timm").model
    for name, parents in (("first", [paths[0], models[1]]), ("second", [models[0], str(paths[1])])):
        result = fused(parents, "timm", tmp_path / name)
        assert_same(tmp_path / name, expected)
        assert all(torch.equal(one, other) for one, other in
                   zip(result.model.parameters(), expected.parameters(), strict=True))  # fmt: skip


def test_without_an_output_the_model_is_made_in_memory(tmp_path: Path) -> None:
    paths, models = pair(tmp_path, "vit")
    before = sorted(tmp_path.rglob("*"))
    result = fused(list(paths), "vit")
    assert all(torch.equal(one, other) for one, other in
               zip(result.model.parameters(), fused(models, "vit").model.parameters(), strict=True))  # fmt: skip
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_result_makes_on_demand(tmp_path: Path) -> None:
    paths, models = pair(tmp_path, "timm")
    expected, result = fused(models, "timm"), fused(list(paths), "timm", tmp_path / "fused")
    for one, other in ((expected.average(), result.average()), (expected.aligned_parent(1), result.aligned_parent(1))):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# what else is in a folder


def give_tokenizer(folder: Path) -> None:
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    made.save_pretrained(folder)


@pytest.mark.parametrize("changes", [{}, {"refine.start": "fused", "refine.steps": 2}], ids=["fused", "refined"])
def test_tokenizer_and_configuration_come_along(changes: dict[str, Any], tmp_path: Path) -> None:
    paths, _ = pair(tmp_path, "bert masked-lm", max_shard_size="10KB")
    for path in paths:
        give_tokenizer(path / "model")
        (path / "model" / "merges.txt").write_text("c a\n")
        (path / "model" / "chat_template.jinja").write_text("{{ messages }}")
        (path / "model" / "weights.bin").write_bytes(b"no")
    fused(list(paths), "bert masked-lm", tmp_path / "fused", **changes)
    folder = tmp_path / "fused" / "model"
    assert transformers.AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("dog") == 6
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja"):
        assert (folder / name).is_file(), name
    assert not (folder / "weights.bin").exists()
    assert not list(folder.glob("*.index.json"))
    assert "library_name: transformers" in (folder / "README.md").read_text()


def test_class_names_come_along(tmp_path: Path) -> None:
    paths, _ = pair(tmp_path, "timm")
    fused(list(paths), "timm", tmp_path / "fused")
    assert class_names(load_model(tmp_path / "fused")) == tuple("0123456789")


def test_a_refined_model_is_the_one_on_disk(tmp_path: Path) -> None:
    paths, _ = pair(tmp_path, "vit")
    changes = {"refine.start": "fused", "refine.steps": 30, "refine.lr": 1e-3}
    result = fused(list(paths), "vit", tmp_path / "fused", **changes)
    assert_same(tmp_path / "fused", result.model)
    assert result.refitted is not None
    assert not torch.equal(result.refitted.get_parameter("classifier.weight"),
                           result.model.get_parameter("classifier.weight"))  # fmt: skip


def test_what_is_taught_from_a_parent_is_on_disk_as_that_parent_was(tmp_path: Path) -> None:
    paths, _ = pair(tmp_path, "bert masked-lm")
    for path in paths:
        give_tokenizer(path / "model")
    changes = {"refine.steps": 2, "refine.start": "parent"}
    result = fused(list(paths), "bert masked-lm", tmp_path / "fused", **changes)
    assert result.teaching is not None
    assert result.teaching.parent is not None
    assert_same(tmp_path / "fused", result.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "fused" / "model")
    assert tokenizer.convert_tokens_to_ids("dog") == 6


# what may go wrong


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PLACES: dict[str, tuple[Any, str]] = {
    "average": (sections, "averaged"), "refit": (refit, "fit_group"), "write": (TensorFile, "write"),
    "move": (Path, "rename"), "move back": (Path, "rename"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("when", "there"),
    [("average", False), ("average", True), ("refit", True), ("write", False), ("move", False), ("move", True),
     ("move back", True)],
)  # fmt: skip
def test_an_error_on_the_way_leaves_nothing_half_written(
    when: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, _ = pair(tmp_path, "timm")
    output = tmp_path / "deep" / "fused"
    if there:
        fused(list(paths), "timm", output)
    before = contents(tmp_path)
    owner, name = PLACES[when]
    original, left = (
        getattr(owner, name),
        {"average": 2, "refit": 5, "write": 30, "move": 0, "move back": int(there)}[when],
    )

    def fails(*args: Any, **keywords: Any) -> Any:
        nonlocal left
        left -= 1
        if left == -1:
            raise KeyboardInterrupt("in the middle")
        return original(*args, **keywords)

    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(KeyboardInterrupt, match="in the middle") as caught:
        fused(list(paths), "timm", output)
    assert caught.tb is not None  # what was on the stack is still alive: nothing may wait for the collector
    assert contents(tmp_path) == before
    assert not list(tmp_path.rglob(".*"))
    assert there or not (output / "model").exists()


def remove_a_shard(folder: Path) -> str:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    return shard.name


def cut_a_shard(folder: Path) -> str:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    return shard.name


def cut_the_index(folder: Path) -> str:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text()[:-20])
    return index.name


def empty_a_shard(folder: Path) -> str:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(b"")
    return shard.name


@pytest.mark.parametrize("damage", [remove_a_shard, cut_a_shard, cut_the_index, empty_a_shard])
def test_damaged_shards_are_one_line(damage: Callable[[Path], str], tmp_path: Path) -> None:
    paths, _ = pair(tmp_path, "vit", max_shard_size="10KB")
    name = damage(paths[1] / "model")

    class Untouched:
        def __iter__(self) -> Any:
            raise AssertionError("the calibration set was read before the folders were checked")

    for attempt in (
        lambda: fusionpl.fuse(list(paths), Untouched(), output=tmp_path / "fused"),
        lambda: load_model(paths[1]),
        lambda: open_model(paths[1]),
    ):
        with pytest.raises(FusionError) as caught:
            attempt()
        assert name in str(caught.value)
        assert str(paths[1]) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "fused").exists()


def test_another_file_beside_the_model_is_not_read(tmp_path: Path) -> None:
    """Hubs keep variants beside a model: model.fp16.safetensors; and shards may stay from an earlier save."""
    paths, models = pair(tmp_path, "vit")
    other = hf_vit(9)
    folder = paths[1] / "model"
    safetensors.torch.save_file(other.state_dict(), folder / "model.fp16.safetensors")
    expected = fused(models, "vit").model
    fused(list(paths), "vit", tmp_path / "first")
    assert_same(tmp_path / "first", expected)
    shutil.copy(folder / "model.fp16.safetensors", folder / "model.zeros.safetensors")
    shutil.copy(folder / "model.fp16.safetensors", folder / "model-00001-of-00001.safetensors")
    fused(list(paths), "vit", tmp_path / "second")
    assert_same(tmp_path / "second", expected)
    with torch.no_grad():
        assert torch.equal(logits(load_model(paths[1]), images(3)), logits(models[1], images(3)))
    shards = tmp_path / "shards" / "model"
    any_model: Any = models[1]
    any_model.save_pretrained(shards, max_shard_size="10KB")
    shutil.copy(folder / "model.fp16.safetensors", shards)
    fused([paths[0], shards], "vit", tmp_path / "third")
    assert_same(tmp_path / "third", expected)


def test_files_are_closed_when_they_were_read(tmp_path: Path) -> None:
    paths, _ = pair(tmp_path, "timm")
    result = fused(list(paths), "timm", tmp_path / "fused")
    assert result.maps
    gc.collect()
    mapped = Path("/proc/self/maps").read_text()
    assert str(tmp_path) not in mapped


def test_the_maps_are_written_with_their_names(tmp_path: Path) -> None:
    paths, _ = pair(tmp_path, "timm")
    result = fused(list(paths), "timm", tmp_path / "fused", anchor=1)
    with safe_open(tmp_path / "fused" / "maps.safetensors", "pt") as maps:
        assert set(maps.keys()) == {f"parent0/{axis}" for axis in result.maps}
        assert torch.equal(maps.get_tensor("parent0/blocks.1.ffn"), result.maps["blocks.1.ffn"].plan.float())
