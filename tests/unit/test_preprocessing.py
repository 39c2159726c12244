"""How images are prepared: as transformers' and timm's own code does it, and carried over exactly between parents."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
import yaml
from PIL import Image
from timm.data import create_transform, resolve_data_config  # type: ignore[attr-defined]  # timm marks no exports
from torch import Tensor, nn

from fusionpl import fuse, load_config, load_model
from fusionpl.calibration.forward import logits
from fusionpl.datamodules.config import DataConfig
from fusionpl.datamodules.images import ImageDataModule
from fusionpl.errors import FusionError
from fusionpl.models.pixels import for_pixels
from fusionpl.models.preprocessing import NORMALIZATIONS, ImageProcessing
from fusionpl.models.processors import image_processing, save_image_processing
from fusionpl.models.save import save_model
from fusionpl.models.vocabulary import load_parent
from tests.unit.test_image_sizes import BUILD

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SQUARE = {"height": 224, "width": 224}
# preprocessor_config.json as published beside models of these names, old layouts among them.
PUBLISHED: dict[str, dict[str, Any]] = {
    "vit-base-patch16-224": {"do_normalize": True, "do_resize": True, **HALF, "size": 224},
    "deit": {
        "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "DeiTFeatureExtractor", "resample": 3, "size": 256, **IMAGENET,
    },
    "dinov2": {
        "crop_size": SQUARE, "do_center_crop": True, "do_convert_rgb": True, "do_rescale": True,
        "image_processor_type": "BitImageProcessor", "resample": 3, "size": {"shortest_edge": 256}, **IMAGENET,
    },
    "clip": {
        "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": 224, **CLIP,
    },
    "siglip": {"image_processor_type": "SiglipImageProcessor", "resample": 3, "size": SQUARE, **HALF},
    "mobilevit": {
        "crop_size": {"height": 256, "width": 256}, "do_center_crop": True, "do_flip_channel_order": True,
        "image_processor_type": "MobileViTImageProcessor", "resample": 2, "size": {"shortest_edge": 288},
    },
    "without rescaling": {
        "do_rescale": False, "image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 48},
        "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 50.0, 40.0],
    },
    "without normalisation": {
        "do_normalize": False, "image_processor_type": "ViTImageProcessor", "resample": 0,
        "size": {"height": 64, "width": 48},
    },
    "other factor": {
        "rescale_factor": 1 / 127.5, "image_processor_type": "ViTImageProcessor", "size": SQUARE,
        "image_mean": [1.0] * 3, "image_std": [1.0] * 3,
    },
}  # fmt: skip
TIMM = (
    "vit_base_patch16_224", "deit_base_patch16_224", "vit_base_patch14_dinov2", "vit_base_patch16_clip_224.openai",
    "vit_base_patch16_siglip_224", "vit_base_patch32_clip_448.laion2b_ft_in12k_in1k",
)  # fmt: skip


def pictures() -> list[Image.Image]:
    """Noise, in which a pixel's shift of a crop shows, of sizes that leave halves of pixels over."""
    noise = np.random.default_rng(0)
    sizes = ((32, 32), (48, 301), (333, 250), (226, 303))
    return [Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def prepared(picture: Image.Image, processing: ImageProcessing) -> Tensor:
    scale, shift = processing.of_channels(3).scale_and_shift()
    return processing.pixels(picture) / scale - shift


def beside(folder: Path, settings: dict[str, Any], name: str = "preprocessor_config.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    transformers.ViTConfig(architectures=["ViTForImageClassification"]).save_pretrained(folder)
    (folder / name).write_text(json.dumps(settings))
    return folder


def timm_folder(folder: Path, cfg: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": cfg}))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_images_are_prepared_as_transformers_does(name: str, tmp_path: Path) -> None:
    folder = beside(tmp_path / "a", PUBLISHED[name])
    found, processor = image_processing(folder), transformers.AutoImageProcessor.from_pretrained(folder)
    assert found is not None
    save_image_processing(beside(tmp_path / "b", {}), found)
    again = transformers.AutoImageProcessor.from_pretrained(tmp_path / "b")
    assert image_processing(tmp_path / "b") == found
    for picture in pictures():
        wanted = processor(picture, return_tensors="pt")["pixel_values"][0]
        assert torch.allclose(prepared(picture, found), wanted, atol=1e-5)
        assert torch.allclose(again(picture, return_tensors="pt")["pixel_values"][0], wanted, atol=1e-5)


@pytest.mark.parametrize("name", TIMM)
def test_images_are_prepared_as_timm_does(name: str, tmp_path: Path) -> None:
    cfg = timm.get_pretrained_cfg(name).to_dict()  # type: ignore[union-attr]
    found = image_processing(timm_folder(tmp_path, cfg))
    assert found is not None
    save_image_processing(tmp_path, found)
    kept = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    theirs, again = (create_transform(**resolve_data_config(pretrained_cfg=one)) for one in (cfg, kept))
    for picture in pictures():
        wanted: Any = theirs(picture)  # type: ignore[operator]
        assert torch.allclose(prepared(picture, found), wanted, atol=1e-5)
        assert torch.equal(again(picture), wanted)  # type: ignore[operator,arg-type]


@pytest.mark.parametrize("mode", ["squash", "center"])
@pytest.mark.parametrize("share", [0.875, 0.9, 0.95, 0.93, 1.0])
@pytest.mark.parametrize("side", [16, 32, 224, 336])
def test_the_share_of_a_crop_comes_back(mode: str, share: float, side: int, tmp_path: Path) -> None:
    cfg = {"input_size": [3, side, side], "crop_pct": share, "crop_mode": mode}
    found = image_processing(timm_folder(tmp_path, cfg))
    assert found is not None
    save_image_processing(tmp_path, found)
    assert image_processing(tmp_path) == found


def test_another_size_keeps_the_share_that_is_cut_off() -> None:
    assert ImageProcessing().at((16, 32)).size == (16, 32)
    for resize, wanted in ((256, 128), ((256, 320), (128, 160))):
        found = ImageProcessing(resize=resize, crop=(224, 224)).at((112, 112))  # type: ignore[arg-type]
        assert (found.resize, found.crop) == (wanted, (112, 112))


def test_a_section_of_processor_config_is_read_and_replaced(tmp_path: Path) -> None:
    settings = {"image_processor_type": "CLIPImageProcessor", "processor_class": "CLIPProcessor", **CLIP}
    folder = beside(tmp_path, {"image_processor": settings}, "processor_config.json")
    found = image_processing(folder)
    assert found is not None
    assert (found.resize, found.crop, found.interpolation) == (224, (224, 224), "bicubic")
    assert found.sees_as(NORMALIZATIONS["clip"])
    other = replace(found, mean=(0.1, 0.2, 0.3))
    save_image_processing(folder, other)
    assert image_processing(folder) == other
    assert transformers.AutoImageProcessor.from_pretrained(folder).image_mean == (0.1, 0.2, 0.3)


def test_a_processor_that_does_more_is_refused(tmp_path: Path) -> None:
    for settings in (
        {"crop_pct": 0.875, "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}},
        {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False, "size": {"shortest_edge": 224}},
        {"image_processor_type": "EfficientNetImageProcessor", "rescale_offset": True, "size": SQUARE},
    ):
        with pytest.raises(
            FusionError, match=r"Processor does more to images than to resize them.*name a copy without"
        ):
            image_processing(beside(tmp_path, settings))
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(FusionError, match=r"the image processor can't be read.*mend preprocessor_config.json"):
        image_processing(tmp_path)
    with pytest.raises(FusionError, match=r"crop_mode border.*can't be prepared here"):
        image_processing(timm_folder(tmp_path / "timm", {"input_size": [3, 16, 16], "crop_mode": "border"}))


def test_where_nothing_is_said_images_come_between_minus_one_and_one(tmp_path: Path) -> None:
    transformers.ViTConfig(architectures=["ViTForImageClassification"]).save_pretrained(tmp_path)
    assert image_processing(tmp_path) is None
    pixels = torch.arange(256).to(torch.uint8)
    scale, shift = ImageProcessing().scale_and_shift()
    assert torch.equal(pixels / scale - shift, (pixels.float() / 127.5 - 1.0)[None, None])


def test_what_an_older_run_was_trained_on_counts(tmp_path: Path) -> None:
    """Its model's folder has the crop of the architecture, which no image ever had."""
    timm_folder(tmp_path / "model", {"mean": [0.5], "std": [0.5], "interpolation": "bicubic"})
    settings: dict[str, Any] = {"data": {"path": "digits"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert image_processing(tmp_path) == image_processing(tmp_path / "model") == ImageProcessing()
    settings["data"]["normalize"] = "auto"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    found = image_processing(tmp_path)
    assert found is not None
    assert found.crop == (224, 224)


A = ImageProcessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
B = ImageProcessing((0.3, 0.5, 0.7), (0.5, 0.25, 0.4))
RAW = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def seen(raw: Tensor, processing: ImageProcessing) -> Tensor:
    """Pixels in 0..1 as a model sees them."""
    scale, shift = processing.scale_and_shift()
    return (raw.flip(1) if processing.bgr else raw) * 255 / scale - shift


def saved(model: nn.Module, folder: Path, processing: ImageProcessing) -> Path:
    save_model(model, folder, processing=processing.at((16, 16)))
    return folder


@pytest.mark.parametrize("own", [B, replace(ImageProcessing((0.0,), (1.0,)), bgr=True)], ids=["other", "bgr"])
@pytest.mark.parametrize("kind", BUILD)
def test_the_patch_embedding_takes_another_normalisation_exactly(
    kind: str, own: ImageProcessing, tmp_path: Path
) -> None:
    """CLIP's has no bias: there the constant goes into the positions."""
    if own.bgr and kind.startswith("timm"):
        pytest.skip("timm knows no order of channels")
    model = BUILD[kind](16, 1)
    folder = saved(model, tmp_path / "a", own)
    with torch.no_grad():
        wanted = logits(load_model(folder), seen(RAW, own))
        found = logits(load_parent(folder, None, processing=A), seen(RAW, A))
        plain = logits(load_parent(folder, None, processing=replace(A, decreed=True)), seen(RAW, own))
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))
    assert torch.equal(plain, wanted)


@pytest.mark.parametrize("sizes", [(16, 16), (16, 24)])
@pytest.mark.parametrize("kind", ["timm", "vit", "clip"])
def test_parents_of_two_normalisations_fuse(kind: str, sizes: tuple[int, int], tmp_path: Path) -> None:
    """The fusion is that of parents which took the anchor's images all along."""
    models = [BUILD[kind](size, seed) for seed, size in enumerate(sizes)]
    paths = [saved(model, tmp_path / name, one) for model, name, one in zip(models, "ab", (A, B), strict=True)]
    config, batches = load_config(None, {"align.solver": "emd", "refit.method": "none"}), [seen(RAW, A)]
    result = fuse(paths, batches, config, names=["a", "b"], output=tmp_path / "fused")
    whole = [load_model(paths[0]), load_parent(paths[1], None, models[0], processing=A)]
    with torch.no_grad():
        wanted = logits(fuse(whole, batches, config).model, seen(RAW, A))
        assert torch.allclose(logits(result.model, seen(RAW, A)), wanted, atol=1e-4)
    assert [line for line in result.warnings if "patch embedding" in line] == [
        "b: trained on images of mean 0.3, 0.5, 0.7 and deviation 0.5, 0.25, 0.4, its patch embedding is rewritten for "
        "a's, mean 0.485, 0.456, 0.406 and deviation 0.229, 0.224, 0.225, which changes no output"
    ]
    kept = image_processing(tmp_path / "fused")
    assert kept == image_processing(paths[0])
    assert kept is not None
    assert kept.size == (16, 16)


def test_a_head_that_is_fitted_keeps_how_images_are_prepared(tmp_path: Path) -> None:
    """Whichever parent is the best, it takes the anchor's images."""
    paths = [saved(BUILD["vit"](16, seed), tmp_path / str(seed), one) for seed, one in enumerate((A, B))]
    config = load_config(None, {"strategy": "head"})
    fuse(paths, [seen(RAW, A)], config, output=tmp_path / "fused")
    assert image_processing(tmp_path / "fused") == image_processing(paths[0])


def test_a_model_in_memory_is_taken_as_it_is_with_a_line(tmp_path: Path) -> None:
    models: list[Any] = [BUILD["timm"](16, seed) for seed in (0, 1)]
    models[1].pretrained_cfg |= {"mean": A.mean, "std": A.std}
    before = copy.deepcopy(models[1].state_dict())
    result = fuse(models, [seen(RAW, ImageProcessing())], load_config(None, {"refit.method": "none"}), names=["a", "b"])
    assert any("b: its pretrained_cfg wants images of mean 0.485" in line for line in result.warnings)
    assert all(torch.equal(tensor, before[name]) for name, tensor in models[1].state_dict().items())


def test_what_differs_but_in_numbers_is_told(tmp_path: Path) -> None:
    paths = [saved(BUILD["vit"](16, seed), tmp_path / name, A) for seed, name in enumerate("ab")]
    save_image_processing(paths[1], replace(A, resize=18, crop=(16, 16), interpolation="bicubic"))
    result = fuse(paths, [seen(RAW, A)], load_config(None, {"refit.method": "none"}), names=["a", "b"])
    assert (
        "b: its images were prepared otherwise (bicubic, shape kept, 89 % of a side kept), and are here as a's "
        "(bilinear, squeezed)"
    ) in result.warnings


def test_a_first_layer_that_pads_is_refused() -> None:
    """At the border black is another number, which no weight can know."""
    model = BUILD["vit"](16, 1)
    next(one for one in model.modules() if isinstance(one, nn.Conv2d)).padding = (1, 1)
    words = "b sees images with mean 0.3, .*, a with mean 0.485.* can't be rewritten.* prepared with --data.normalize$"
    with pytest.raises(FusionError, match=words):
        for_pixels(model, B, A, model.get_parameter, names=("b", "a"))


def test_normalize_is_read_and_mistakes_are_a_line() -> None:
    def first(normalize: Any, **more: Any) -> Tensor:
        data = ImageDataModule(DataConfig(image_size=8, normalize=normalize, **more))
        found: Tensor = next(iter(data.test_dataloader()))["pixel_values"]
        return found

    half, none, named = first("auto"), first("none"), first({"mean": 0.25, "std": [2.0]})
    assert torch.equal(half, first("half"))
    assert torch.allclose(none, half / 2 + 0.5, atol=1e-6)
    assert torch.allclose(named, (none - 0.25) / 2, atol=1e-6)
    colour = first("imagenet", channels=3)
    assert torch.allclose(colour[:, 2], (none[:, 0] - 0.406) / 0.225, atol=1e-5)
    mistakes: dict[str, Callable[[], object]] = {
        "there is no 'imagnet'; did you mean 'imagenet'": lambda: first("imagnet"),
        "give mean and std, of one number": lambda: first({"mean": [0.5]}),
        "std must be above 0": lambda: first({"mean": [0.5], "std": [0.0]}),
        "images of 1 channels are to be normalised by 3 different numbers": lambda: first("imagenet"),
    }
    for words, call in mistakes.items():
        with pytest.raises(FusionError, match=words):
            call()


def test_what_augmentation_fills_is_black() -> None:
    data = ImageDataModule(DataConfig(image_size=8, channels=3, shift=3, normalize="imagenet"))
    white = (1 - torch.tensor(A.mean)) / torch.tensor(A.std)
    batch = {"pixel_values": white[:, None, None].expand(40, 3, 8, 8)}
    moved = data.augmented(batch)["pixel_values"]
    black = -torch.tensor(A.mean) / torch.tensor(A.std)
    same = [(moved - one[:, None, None]).abs().amax(1) < 1e-5 for one in (white, black)]
    assert (same[0] | same[1]).all()
    assert same[1].any()
