"""How a model takes its images, in the files of timm and transformers: read, and saved so that both do the same."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from PIL import Image
from timm.data.config import resolve_data_config
from torch import nn
from torchvision.transforms import InterpolationMode

from fusionpl.errors import FusionError, reason
from fusionpl.models.adapters import is_adapter
from fusionpl.models.folders import base_folder, model_config, model_folder
from fusionpl.models.preprocessing import NORMALIZATIONS, ImageProcessing, Size
from fusionpl.models.quiet import quiet_transformers
from fusionpl.options import read_yaml

PROCESSOR, PROCESSORS, SECTION = "preprocessor_config.json", "processor_config.json", "image_processor"
NEAR = 0.5  # of 255: what a resized image may be off, on average, to count as the same


def image_processing(source: str | Path) -> ImageProcessing | None:
    """How a model takes its images, as its folder says; None where it says nothing.

    A run of before normalisation was an option was trained on what `ImageProcessing()` gives, whatever its folder says.

    Args:
        source: a run folder, a model folder, or a hub id, of which no weights are downloaded.

    Raises:
        FusionError: what the folder says can't be read, or does more to images than `ImageProcessing` knows.
    """
    folder = model_folder(str(source), weights=False)
    settings = folder.parent / "config.yaml"
    if folder.name == "model" and settings.is_file():
        data = read_yaml(settings).get("data")
        if isinstance(data, dict) and "normalize" not in data:
            return ImageProcessing()
    if not _has_processor(folder) and is_adapter(folder):
        folder = base_folder(folder, weights=False)
    config = model_config(folder)
    if "architecture" in config:
        cfg = config.get("pretrained_cfg")
        return _of_timm(f"{folder}/config.json", cfg) if cfg else None
    return _of_transformers(folder) if _has_processor(folder) else None


def timm_processing(model: nn.Module) -> ImageProcessing | None:
    """How a model of timm in memory takes its images, as its `pretrained_cfg` says; None where that says nothing."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    return _of_timm("pretrained_cfg", cfg) if cfg.get("mean") and cfg.get("std") else None


def save_image_processing(folder: Path, processing: ImageProcessing) -> None:
    """Writes how a model takes its images into its folder, unless it says so already.

    Args:
        folder: of timm or transformers.
        processing: with a size.
    """
    config = model_config(folder)
    if "architecture" in config:
        mode = "center" if isinstance(processing.resize, int) else "squash"
        settings = {
            key: value for key, value in config.get("pretrained_cfg", {}).items() if not key.startswith("test_")
        }
        channels = settings.get("input_size", [len(processing.mean)])[0]
        config["pretrained_cfg"] = settings | {
            "input_size": [channels, *(processing.size or ())],
            "mean": processing.mean,
            "std": processing.std,
            "interpolation": processing.interpolation,
            "crop_pct": _crop_pct(processing),
            "crop_mode": mode,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    elif not _has_processor(folder) or _of_transformers(folder) != processing:
        _forget_processor(folder)
        _as_transformers(processing).save_pretrained(folder)


def _of_timm(place: str, cfg: Mapping[str, Any]) -> ImageProcessing:
    settings = resolve_data_config(pretrained_cfg=dict(cfg))
    height, width = settings["input_size"][-2:]
    mode, interpolation = settings["crop_mode"] or "center", settings["interpolation"]
    known = {resampling.value for resampling in InterpolationMode}
    if mode not in ("squash", "center") or (mode == "center" and height != width) or interpolation not in known:
        raise FusionError(
            f"{place}: images of {height}x{width} with crop_mode {mode} and interpolation {interpolation} "
            "can't be prepared here; name a copy with others in its pretrained_cfg"
        )
    scaled = tuple(int(side / settings["crop_pct"]) for side in (height, width))
    return ImageProcessing(
        mean=tuple(map(float, settings["mean"])),
        std=tuple(map(float, settings["std"])),
        resize=scaled[0] if mode == "center" else cast(Size, scaled),
        crop=None if mode == "squash" and scaled == (height, width) else (height, width),
        interpolation=interpolation,
    )


def _crop_pct(processing: ImageProcessing) -> float:
    """The share that timm divides a side by, and rounds down, to resize by it before the crop."""
    if processing.crop is None or processing.resize is None:
        return 1.0
    side = processing.crop[0]
    scaled = processing.resize if isinstance(processing.resize, int) else processing.resize[0]
    exact = (round(side / scaled, digits) for digits in range(2, 16))
    return next((share for share in exact if int(side / share) == scaled), side / (scaled + 0.5))


def _has_processor(folder: Path) -> bool:
    if (folder / PROCESSOR).is_file():
        return True
    return (folder / PROCESSORS).is_file() and f'"{SECTION}"' in (folder / PROCESSORS).read_text()


def _forget_processor(folder: Path) -> None:
    """Takes out what would be read before preprocessor_config.json."""
    if (folder / PROCESSORS).is_file():
        sections = json.loads((folder / PROCESSORS).read_text())
        sections.pop(SECTION, None)
        (folder / PROCESSORS).write_text(json.dumps(sections, indent=2))


def _of_transformers(folder: Path) -> ImageProcessing:
    try:
        with quiet_transformers():
            processor: Any = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a broken file raises whatever its parser does
        raise FusionError(
            f"{folder}: the image processor can't be read ({reason(error)}); mend {PROCESSOR}, or name a copy without "
            "it and give --data.normalize"
        ) from error
    try:
        processing = _settings_of(processor)
        same = _prepares_alike(processor, processing)
    except Exception as error:  # settings that are not there or not meant for images of one size
        raise _unknown(folder, processor) from error
    if not same:
        raise _unknown(folder, processor)
    return processing


def _unknown(folder: Path, processor: Any) -> FusionError:
    return FusionError(
        f"{folder}: its {type(processor).__name__} does more to images than to resize them to one size, cut out the "
        f"middle and normalise; name a copy without {PROCESSOR} and give --data.normalize"
    )


def _settings_of(processor: Any) -> ImageProcessing:
    """What the attributes of an image processor say."""
    size, cut = (_plain(getattr(processor, name, None)) for name in ("size", "crop_size"))
    crop = _sides(cut) if getattr(processor, "do_center_crop", False) else None
    resize = (size["shortest_edge"] if "shortest_edge" in size else _sides(size)) if processor.do_resize else None
    if "longest_edge" in size or (isinstance(resize, int) and crop is None):
        raise ValueError("images keep shapes of their own")
    factor = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    normalises = bool(processor.do_normalize)
    means, deviations = (processor.image_mean, processor.image_std) if normalises else (0.0, 1.0)
    return ImageProcessing(
        mean=tuple(float(mean) / factor for mean in np.atleast_1d(means)),
        std=tuple(float(deviation) / factor for deviation in np.atleast_1d(deviations)),
        resize=resize,
        crop=crop,
        interpolation=Image.Resampling(int(processor.resample)).name.lower() if processor.do_resize else "bilinear",
        bgr=bool(getattr(processor, "do_flip_channel_order", False)),
        library="transformers",
    )


def _plain(size: Any) -> dict[str, int]:
    """A size of an image processor, without the kinds of lengths that it does not give."""
    return {key: int(value) for key, value in dict(size or {}).items() if value is not None}


def _sides(size: Mapping[str, int]) -> Size:
    return size["height"], size["width"]


def _prepares_alike(processor: Any, processing: ImageProcessing) -> bool:
    """Whether an image of no special shape comes out of a processor as `ImageProcessing` makes it."""
    channels = len(processing.mean) if len(processing.mean) != 1 else 3
    noise = np.random.default_rng(0).integers(0, 256, (75, 120, channels), dtype=np.uint8)
    picture = Image.fromarray(noise)
    theirs = torch.as_tensor(processor(picture, return_tensors="pt")["pixel_values"][0])
    scale, shift = processing.of_channels(channels).scale_and_shift()
    ours = processing.pixels(picture) / scale - shift
    return ours.shape == theirs.shape and float(((ours - theirs) * scale).abs().mean()) < NEAR


def _as_transformers(processing: ImageProcessing) -> Any:
    """An image processor of transformers that does the same.

    Raises:
        FusionError: there is none.
    """
    resize, crop = processing.resize, processing.crop
    settings: dict[str, Any] = {
        "do_resize": resize is not None,
        "resample": int(Image.Resampling[processing.interpolation.upper()]),
        "do_center_crop": crop is not None,
    }
    if resize is not None:
        settings["size"] = {"shortest_edge": resize} if isinstance(resize, int) else _named(resize)
    if crop is not None:
        settings["crop_size"] = _named(crop)
    if not processing.bgr:
        mean, std = list(processing.mean), list(processing.std)
        return transformers.ViTImageProcessor(**settings, do_normalize=True, image_mean=mean, image_std=std)
    if not processing.sees_as(replace(NORMALIZATIONS["none"], bgr=True)):
        raise FusionError(
            "no image processor of transformers both normalises and gives blue, green, red; use --data.normalize none"
        )
    return transformers.MobileViTImageProcessor(**settings)


def _named(size: Size) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}
