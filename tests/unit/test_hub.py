from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fusionpl.errors import FusionError
from fusionpl.models.hub import short_name
from fusionpl.models.load import load_model
from fusionpl.models.opened import open_model
from fusionpl.models.save import save_model
from fusionpl.models.tokenizers import load_tokenizer, train_wordpiece
from tests import hub
from tests.models_for_tests import largest_difference, text_model

Serve = Callable[[hub.Folders], hub.Hub]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Serve]:
    monkeypatch.chdir(tmp_path)
    with hub.serving({}, monkeypatch, tmp_path / "cache") as stand_in:

        def show(repos: hub.Folders) -> hub.Hub:
            stand_in.repos = repos
            return stand_in

        yield show


def model(seed: int) -> nn.Module:
    return text_model("bert masked-lm", seed)


def saved(folder: Path, seed: int = 0) -> Path:
    save_model(model(seed), folder)
    return folder


def pickled(folder: Path, seed: int = 0) -> Path:
    saved(folder, seed)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def empty(folder: Path) -> Path:
    folder.mkdir()
    (folder / "README.md").write_text("see the branches")
    return folder


def test_branches_tags_and_pull_requests_are_read(serve: Serve, tmp_path: Path) -> None:
    names = ("main", "step3000", "tags/v1.0", "refs/pr/1")
    serve({"org/bert": {name: saved(tmp_path / str(seed), seed) for seed, name in enumerate(names)}})
    for seed, source in enumerate(("org/bert", "org/bert@step3000", "org/bert@v1.0", "org/bert@refs/pr/1")):
        assert largest_difference(load_model(source), model(seed)) == 0
        opened = open_model(source)
        assert opened is not None
        name = "bert.encoder.layer.1.output.dense.weight"
        assert torch.equal(opened.read(name), model(seed).get_parameter(name))
    assert largest_difference(load_model(f"org/bert@{hub.commit('org/bert', 'step3000')}"), model(1)) == 0


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("org/bert", "bert"),
        ("bert", "bert"),
        ("org/bert@step3000", "bert@step3000"),
        ("org/bert@refs/pr/1", "bert@refs-pr-1"),
        ("runs/vit/seed-1", "seed-1"),
        (Path("runs/vit/seed-1"), "seed-1"),
        ("/models/a@b", "a@b"),
    ],
)
def test_short_names_are_names_of_folders(source: str | Path, name: str) -> None:
    assert short_name(source) == name


def test_a_folder_comes_before_the_hub(serve: Serve, tmp_path: Path) -> None:
    stand_in = serve({"org/bert@old": {"main": saved(tmp_path / "on-the-hub", 1)}})
    saved(tmp_path / "org/bert@old", 2)
    assert largest_difference(load_model("org/bert@old"), model(2)) == 0
    with pytest.raises(FusionError, match=r"no model at org/bert@new; under .*org there are: bert@old"):
        load_model("org/bert@new")
    assert not stand_in.requests


def test_only_what_makes_the_model_is_downloaded(serve: Serve, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    (folder / "onnx").mkdir()
    for name in ("pytorch_model.bin", "model.fp16.safetensors", "consolidated.safetensors", "tf.h5", "onnx/x.json"):
        (folder / name).write_bytes(b"large")
    stand_in = serve({"org/bert": {"main": folder}})
    load_model("org/bert", allow_pickle=True)
    assert sorted(stand_in.downloads) == ["config.json", "model.safetensors"]


def test_a_tokenizer_comes_without_weights(serve: Serve, tmp_path: Path) -> None:
    save_model(model(0), tmp_path / "model", tokenizer=train_wordpiece(["a cat sleeps, a cat runs"], 60))
    empty(tmp_path / "nothing")
    stand_in = serve({"org/bert": {"main": tmp_path / "model", "nothing": tmp_path / "nothing"}})
    found = load_tokenizer("org/bert")
    assert found is not None
    assert "cat" in found.get_vocab()
    assert "model.safetensors" not in stand_in.downloads
    assert load_tokenizer("org/bert@nothing") is None


def test_shards_are_downloaded(serve: Serve, tmp_path: Path) -> None:
    model(3).save_pretrained(tmp_path / "model", max_shard_size="8KB")
    serve({"org/bert": {"main": tmp_path / "model"}})
    assert largest_difference(load_model("org/bert"), model(3)) == 0


def test_a_pickle_is_refused_with_what_goes_on(serve: Serve, tmp_path: Path) -> None:
    revisions = {"main": pickled(tmp_path / "main"), "refs/pr/1": saved(tmp_path / "converted", 1)}
    stand_in = serve({"org/bert": revisions, "org/old": {"main": revisions["main"]}})
    words = (
        r"^'org/bert' at revision main holds pytorch_model.bin and no model.safetensors; pytorch_model.bin is a "
        r"pickle: --allow-pickle \(allow_pickle=True\) reads the tensors in it and nothing else; revisions that hold "
        r"safetensors: refs/pr/1$"
    )
    with pytest.raises(FusionError, match=words):
        load_model("org/bert")
    with pytest.raises(FusionError, match=r"'org/old' at revision main holds pytorch_model.bin .* and nothing else$"):
        open_model("org/old")
    assert "pytorch_model.bin" not in stand_in.downloads
    assert largest_difference(load_model("org/bert", allow_pickle=True), model(0)) == 0


def test_a_revision_without_weights_lists_those_that_hold_some(serve: Serve, tmp_path: Path) -> None:
    nothing, some = empty(tmp_path / "nothing"), saved(tmp_path / "some")
    steps = {f"step{step}": some for step in (1000, 143000, 20000)}
    serve({"org/neox": {"main": nothing, "wip": nothing, **steps, "tags/v2": some}, "org/new": {"main": nothing}})
    words = (
        r"^'org/neox' at revision main holds no weights; revisions that hold weights: step143000, step20000, step1000, "
        r"v2; name one as org/neox@step143000$"
    )
    with pytest.raises(FusionError, match=words):
        load_model("org/neox")
    with pytest.raises(FusionError, match=r"'org/neox' at revision wip holds no weights; .* step143000"):
        open_model("org/neox@wip", allow_pickle=True)
    with pytest.raises(FusionError, match=r"^'org/new' at revision main holds no weights; no other revision has any$"):
        load_model("org/new")


def test_weights_of_another_library_are_named(serve: Serve, tmp_path: Path) -> None:
    (empty(tmp_path / "tf") / "tf_model.h5").write_bytes(b"weights")
    serve({"org/bert": {"main": tmp_path / "tf", "torch": pickled(tmp_path / "torch")}})
    words = "at revision main holds no weights but tf_model.h5, which is never read; revisions that hold weights: torch"
    with pytest.raises(FusionError, match=words):
        load_model("org/bert")


def test_looking_for_revisions_with_weights_ends(serve: Serve, tmp_path: Path) -> None:
    nothing, some = empty(tmp_path / "nothing"), saved(tmp_path / "some")
    many = {"main": nothing} | {f"step{step}": some for step in range(50)}
    stand_in = serve({"org/many": many, "org/none": {f"step{step}": nothing for step in range(50)} | {"main": nothing}})
    with pytest.raises(FusionError, match=r"step49, step48, .*step42, and maybe more; name one as org/many@step49$"):
        load_model("org/many")
    assert sum("/tree/step" in path for path in stand_in.requests) == 8
    with pytest.raises(FusionError, match=r"^'org/none' at revision main holds no weights$"):
        load_model("org/none")
    assert sum("org/none/tree/step" in path for path in stand_in.requests) <= 48


def test_an_unknown_revision_or_repository(serve: Serve, tmp_path: Path) -> None:
    serve({"org/bert": {"main": saved(tmp_path / "model"), "step3000": tmp_path / "model"}})
    with pytest.raises(FusionError, match=r"^'org/bert' has no revision 'step300'; did you mean 'step3000'\?$"):
        load_model("org/bert@step300")
    with pytest.raises(FusionError, match=r"^'org/bert' has no revision 'zzz'; it has step3000, main$"):
        load_tokenizer("org/bert@zzz")
    with pytest.raises(
        FusionError, match=r"'org/bart' is neither a folder nor a model on the hub \(if it is a private"
    ):
        load_model("org/bart")


def test_what_was_downloaded_is_read_without_the_hub(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve({"org/bert": {"main": saved(tmp_path / "model"), "old": pickled(tmp_path / "old", 1)}})
    load_model("org/bert")
    load_model("org/bert@old", allow_pickle=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert largest_difference(load_model("org/bert"), model(0)) == 0
    assert largest_difference(load_model("org/bert@old", allow_pickle=True), model(1)) == 0
    with pytest.raises(
        FusionError, match=r"revision old holds no model\.safetensors; pytorch_model\.bin is a pickle: --allow"
    ):
        load_model("org/bert@old")
    with pytest.raises(FusionError, match="'org/bert@new' is neither a folder nor a model the hub gives out"):
        load_model("org/bert@new")


def test_a_damaged_download_is_named(serve: Serve, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    serve({"org/bert": {"main": folder}})
    with pytest.raises(FusionError, match=r"model\.safetensors lacks "):
        open_model("org/bert")
