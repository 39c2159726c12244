"""Parents for images of another size: position embeddings are interpolated to the anchor's."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from fusionpl import fuse, load_config, load_model
from fusionpl.calibration.forward import logits
from fusionpl.errors import FusionError
from fusionpl.models.build import build_model
from fusionpl.models.config import ModelConfig
from fusionpl.models.images import with_image_size
from fusionpl.models.opened import open_model
from fusionpl.models.save import save_model
from fusionpl.models.vocabulary import load_parent
from tests.models_for_tests import largest_difference, redrawn, text_model

HF = {"patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
      "num_labels": 5}  # fmt: skip
NO_REFIT = {"align.solver": "emd", "refit.method": "none"}


def timm_vit(size: Any, seed: int, name: str = "vit_tiny_patch16_224", patch: int = 4, **more: Any) -> nn.Module:
    args = {"img_size": size, "patch_size": patch, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2, **more}
    return redrawn(build_model(ModelConfig("timm", name, args), num_classes=5), seed)


def clip(size: int, seed: int) -> nn.Module:
    sizes = {key: value for key, value in HF.items() if key != "num_labels"}
    config = transformers.CLIPConfig(
        vision_config={**sizes, "image_size": size, "projection_dim": 16}, text_config={"hidden_size": 16},
        projection_dim=16, num_labels=5,
    )  # fmt: skip
    return redrawn(transformers.CLIPForImageClassification(config), seed)


BUILD: dict[str, Callable[[int, int], nn.Module]] = {
    "timm": timm_vit,
    "timm without class embedding": lambda size, seed: timm_vit(size, seed, no_embed_class=True),
    "timm deit": lambda size, seed: timm_vit(size, seed, "deit_tiny_distilled_patch16_224"),
    "vit": lambda size, seed: redrawn(
        transformers.ViTForImageClassification(transformers.ViTConfig(**HF, image_size=size)), seed
    ),
    "deit": lambda size, seed: redrawn(
        transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**HF, image_size=size)), seed
    ),
    "dinov2": lambda size, seed: redrawn(
        transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**HF, image_size=size)), seed
    ),
    "clip": clip,
}
PREFIX = {"timm deit": 2, "deit": 2, "timm without class embedding": 0}
PLACES = ("pos_embed", "embeddings.position_embeddings", "position_embedding.weight")


def places(model: nn.Module) -> Tensor:
    found = [tensor for name, tensor in model.named_parameters() if name.endswith(PLACES)]
    assert len(found) == 1
    return found[0].detach().reshape(-1, found[0].shape[-1])


def pictures(size: int = 16, count: int = 12) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", BUILD)
def test_a_parent_is_interpolated_as_timm_does(kind: str) -> None:
    model, like = BUILD[kind](24, 1), BUILD[kind](16, 2)
    before = copy.deepcopy(model)
    found = with_image_size(model, like)
    prefix = PREFIX.get(kind, 1)
    wanted = resample_abs_pos_embed(places(model)[None], [4, 4], [6, 6], num_prefix_tokens=prefix)[0]
    assert torch.allclose(places(found), wanted)
    assert torch.equal(places(found)[:prefix], places(model)[:prefix])
    others = dict(model.named_parameters())
    assert all(torch.equal(tensor, others[name]) for name, tensor in found.named_parameters()
               if not name.endswith(PLACES))  # fmt: skip
    with torch.no_grad():
        assert logits(found, pictures()).shape == (12, 5)
    assert largest_difference(model, before) == 0
    assert places(model).shape == places(before).shape
    assert with_image_size(found, like) is found


@pytest.mark.parametrize("sizes", [(16, 24), (24, 16)])
@pytest.mark.parametrize("kind", BUILD)
def test_parents_of_two_sizes_fuse(kind: str, sizes: tuple[int, int], tmp_path: Path) -> None:
    models = [BUILD[kind](size, seed) for seed, size in enumerate(sizes)]
    paths = [tmp_path / name for name in "ab"]
    for model, path in zip(models, paths, strict=True):
        save_model(model, path)
    config, batches = load_config(None, NO_REFIT), [pictures(sizes[0])]
    before = copy.deepcopy(models[1])
    result = fuse(models, batches, config, names=["a", "b"])
    wanted = fuse([models[0], with_image_size(models[1], models[0])], batches, config)
    assert largest_difference(result.model, wanted.model) < 1e-6
    assert largest_difference(models[1], before) == 0
    assert result.warnings == [
        f"b: trained on images of {sizes[1]}x{sizes[1]}, its position embeddings are interpolated to a's "
        f"{sizes[0]}x{sizes[0]}, and it is measured so"
    ]
    by_path = fuse(paths, batches, config, names=["a", "b"], output=tmp_path / "fused")
    assert largest_difference(by_path.model, wanted.model) < 1e-6
    assert largest_difference(load_model(tmp_path / "fused"), wanted.model) < 1e-6
    assert by_path.warnings == result.warnings
    opened = open_model(paths[0])
    assert opened is not None
    whole = load_parent(paths[1], None, opened.module)
    assert largest_difference(whole, with_image_size(models[1], models[0])) < 1e-6


def test_the_default_fuses_them_too() -> None:
    models = [timm_vit(16, 1), timm_vit(24, 2)]
    result = fuse(models, [pictures(count=40)], names=["a", "b"])
    with torch.no_grad():
        assert logits(result.model, pictures()).isfinite().all()


def test_images_that_are_not_square() -> None:
    model, like = timm_vit((24, 16), 1), timm_vit((16, 32), 2)
    found = with_image_size(model, like)
    assert torch.allclose(places(found), resample_abs_pos_embed(places(model)[None], [4, 8], [6, 4])[0])
    with torch.no_grad():
        assert logits(found, torch.randn(2, 3, 16, 32)).shape == (2, 5)


def test_timm_itself_makes_the_same_of_it(tmp_path: Path) -> None:
    model = timm_vit(24, 1)
    save_model(model, tmp_path / "a")
    own = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True, img_size=16)
    assert largest_difference(with_image_size(model, timm_vit(16, 2)), own) < 1e-6


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_another_size_of_patches_is_refused(library: str) -> None:
    if library == "timm":
        models = [timm_vit(16, 1), timm_vit(32, 2, patch=8)]
    else:
        configs = [transformers.ViTConfig(**HF | {"patch_size": patch}, image_size=16) for patch in (4, 8)]
        models = [redrawn(transformers.ViTForImageClassification(config), 1) for config in configs]
    words = "parents cut images into patches of different size: a of 4x4, b of 8x8; use one patch size$"
    with pytest.raises(FusionError, match=words):
        fuse(models, [pictures()], names=["a", "b"])


def test_positions_of_text_are_refused() -> None:
    short = text_model("bert masked-lm", 1)
    config: Any = copy.deepcopy(short.config)
    config.max_position_embeddings = 40
    long = redrawn(transformers.BertForMaskedLM(config), 2)
    with pytest.raises(FusionError, match="differ on the fixed axis 'positions': a has 20, b has 40"):
        fuse([short, long], [], names=["a", "b"])
