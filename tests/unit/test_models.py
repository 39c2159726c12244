import copy
import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fusionpl.calibration.forward import logits
from fusionpl.errors import FusionError
from fusionpl.models.build import build_model
from fusionpl.models.config import ModelConfig
from fusionpl.models.load import load_model
from fusionpl.models.save import class_names, save_model

NAMES = ("ant", "bee", "cat")
TIMM = ModelConfig(
    args={"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2},
    initializer_range=0.1,
)
HF = ModelConfig(
    "transformers",
    "ViTForImageClassification",
    {
        "image_size": 16,
        "patch_size": 4,
        "num_channels": 1,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    },
    initializer_range=0.1,
)
LIBRARIES = pytest.mark.parametrize("config", [TIMM, HF], ids=["timm", "transformers"])


def built(config: ModelConfig = TIMM) -> nn.Module:
    torch.manual_seed(0)
    return build_model(config, num_classes=3, class_names=NAMES).eval()


def answers(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return logits(model, torch.linspace(-1, 1, 512).view(2, 1, 16, 16))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(built(), tmp_path / "model")
    return tmp_path / "model"


@LIBRARIES
def test_a_saved_model_comes_back(config: ModelConfig, tmp_path: Path) -> None:
    model = built(config)
    save_model(model, tmp_path / "model", card="# Ants and bees")
    loaded = load_model(tmp_path / "model")
    assert torch.equal(answers(loaded), answers(model))
    assert not loaded.training
    assert class_names(loaded) == NAMES
    card = (tmp_path / "model" / "README.md").read_text()
    assert "# Ants and bees" in card
    assert f"library_name: {config.library}" in card


@LIBRARIES
def test_a_changed_copy_of_a_loaded_model_is_saved_again(config: ModelConfig, tmp_path: Path) -> None:
    save_model(built(config), tmp_path / "first")
    changed = copy.deepcopy(load_model(tmp_path / "first"))
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.5)
    save_model(changed, tmp_path / "second")
    again = load_model(tmp_path / "second")
    assert torch.equal(answers(again), answers(changed))
    assert not torch.equal(answers(again), answers(load_model(tmp_path / "first")))
    assert class_names(again) == NAMES


def test_timm_itself_reads_a_saved_model(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    by_folder = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
    by_name = timm.create_model(
        config["architecture"], **config["model_args"], checkpoint_path=str(saved / "model.safetensors")
    ).eval()
    assert torch.equal(answers(by_folder), answers(built()))
    assert torch.equal(answers(by_name), answers(built()))
    assert config["label_names"] == list(NAMES)


def test_a_model_trained_from_nothing_claims_no_pretrained_weights(saved: Path) -> None:
    origin = json.loads((saved / "config.json").read_text())["pretrained_cfg"]
    assert not {"tag", "license", "url", "hf_hub_id"} & origin.keys()
    assert origin["mean"] == [0.5]


def test_a_run_folder_stands_for_its_model(saved: Path) -> None:
    assert torch.equal(answers(load_model(saved.parent)), answers(load_model(saved)))


@LIBRARIES
def test_without_class_names_there_are_none(config: ModelConfig) -> None:
    assert class_names(build_model(config, num_classes=3)) is None


@LIBRARIES
def test_the_initialiser_draws_weights_of_its_width(config: ModelConfig) -> None:
    model = built(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and parameter.numel() >= 200:
            assert parameter.std().item() == pytest.approx(0.1, rel=0.25), name
        if name.endswith("bias"):
            assert not parameter.any(), name
    embeddings = [p for n, p in model.named_parameters() if "pos_embed" in n or "position_embeddings" in n]
    assert len(embeddings) == 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            ModelConfig(architecture="vit_tinny_patch16_224"),
            "timm has no architecture 'vit_tinny_patch16_224'; did you",
        ),
        (ModelConfig(args={"embed_dims": 8}), "embed_dims"),
        (
            ModelConfig("transformers", "ViTForImageClasification"),
            "no model class 'ViTForImageClasification'; did you mean 'ViTForImageClassification'?",
        ),
        (
            ModelConfig("transformers", "ViTForImageClassification", {"hiden_size": 8}),
            "ViTConfig has no argument 'hiden_size'; did you mean 'hidden_size'?",
        ),
    ],
)
def test_a_config_that_fits_no_model(config: ModelConfig, words: str) -> None:
    with pytest.raises(FusionError, match=words.replace("?", r"\?")):
        build_model(config, num_classes=3)


def test_class_names_must_fit_the_classes() -> None:
    with pytest.raises(FusionError, match="3 class names for 4 classes"):
        build_model(TIMM, num_classes=4, class_names=NAMES)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def edit_config(folder: Path, **args: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model_args"].update(args)
    (folder / "config.json").write_text(json.dumps(config))


def drop_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["blocks.1.mlp.fc1.weight"]
    save_file(state, folder / "model.safetensors")


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, r"model\.safetensors is truncated or damaged"),
        (drop_tensor, r"lacks blocks\.1\.mlp\.fc1\.weight"),
        (lambda folder: edit_config(folder, depth=1), r"holds blocks\.1\.\S+, which vit_tiny_patch16_224 has not"),
        (lambda folder: edit_config(folder, embed_dim=8), r"blocks\.0\.\S+ is \(\S+\), but by config\.json it is"),
        (lambda folder: edit_config(folder, img_size=32), r"pos_embed is \(1, 17, 16\), but by config\.json it is"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("{}"), r"config\.json names no architecture"),
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"has no model\.safetensors"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "best.pth"),
            r"has no model\.safetensors; best\.pth is a pickle, which is never read",
        ),
        (
            only_a_pickle,
            r"has no model\.safetensors; pytorch_model\.bin is a pickle: --allow-pickle \(allow_pickle=True\)",
        ),
    ],
)
def test_a_damaged_folder_is_named(saved: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(saved)
    with pytest.raises(FusionError, match=words) as caught:
        load_model(saved)
    assert str(saved) in str(caught.value)


def test_a_transformers_model_with_other_sizes_than_its_config(tmp_path: Path) -> None:
    save_model(built(HF), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_size": 8}))
    with pytest.raises(FusionError, match=r"is \(.*16.*\), but by config\.json it is \(.*8.*\)"):
        load_model(tmp_path / "model")


def test_a_missing_folder_lists_the_models_beside_it(tmp_path: Path) -> None:
    save_model(built(), tmp_path / "seed-1" / "model")
    save_model(built(), tmp_path / "seed-2" / "model")
    with pytest.raises(FusionError, match=r"no model at .*seed-3; under .* there are: seed-1, seed-2"):
        load_model(tmp_path / "seed-3")


def test_an_unfinished_run_says_how_to_finish_it(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FusionError, match="the run did not finish, continue it with --resume"):
        load_model(tmp_path)


def test_a_hub_id_without_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FusionError, match="'nobody/nothing' is neither a folder nor a model the hub gives out"):
        load_model("nobody/nothing")


def test_a_failed_save_leaves_the_old_model_and_nothing_else(saved: Path) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    with pytest.raises(FusionError, match="cannot save a Linear"):
        save_model(nn.Linear(2, 2), saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    assert list(saved.parent.iterdir()) == [saved]
