"""What strangers bring: parents trained under a normalisation of their own, through every command."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from timm.data import create_transform, resolve_data_config  # type: ignore[attr-defined]  # timm marks no exports
from torch import Tensor, nn

from fusionpl import load_model
from fusionpl.calibration.forward import logits
from fusionpl.cli import evaluate, finetune, fuse, sweep, train
from fusionpl.cli.running import main
from fusionpl.datamodules.config import DataConfig
from fusionpl.datamodules.images import ImageDataModule
from fusionpl.evaluation.report import Report
from fusionpl.models.processors import image_processing

CLASSES = ("dark", "dim", "bright")
QUIET = ["--logger", "none"]
CPU = ["--trainer.accelerator", "cpu"]
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
Prepare = Callable[[Image.Image], Tensor]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that differ by how bright they are, which another normalisation changes; they are not square."""
    home, noise = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 40)):
        for number, name in enumerate(CLASSES):
            (home / split / name).mkdir(parents=True)
            for index in range(count):
                level = 95 + 35 * number + noise.normal(0, 9)
                pixels = level + noise.normal(0, 30, (22, 29, 3))
                Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(home / split / name / f"{index}.png")
    return home


def split_of(images: Path, split: str, prepare: Prepare, mode: str = "RGB") -> tuple[Tensor, Tensor]:
    """A split as a stranger's own code reads it; classes are in the order of their names, as `datasets` has them."""
    names = sorted(CLASSES)
    files = [file for name in names for file in sorted((images / split / name).glob("*"))]
    labels = torch.tensor([names.index(file.parent.name) for file in files])
    return torch.stack([prepare(Image.open(file).convert(mode)) for file in files]), labels


def learned(model: nn.Module, images: Path, prepare: Prepare, mode: str = "RGB") -> nn.Module:
    pixels, labels = split_of(images, "train", prepare, mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = nn.functional.cross_entropy(logits(model.train(), pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Path, prepare: Prepare, mode: str = "RGB") -> float:
    pixels, labels = split_of(images, "test", prepare, mode)
    return float((logits(model.eval(), pixels).argmax(-1) == labels).float().mean())


def by_transformers(folder: Path) -> Prepare:
    processor: Any = transformers.AutoImageProcessor.from_pretrained(folder)
    return lambda picture: processor(picture, return_tensors="pt")["pixel_values"][0]


def by_timm(folder: Path) -> Prepare:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    found: Any = create_transform(**resolve_data_config(model=model))  # type: ignore[arg-type]
    return found  # type: ignore[no-any-return]


def of_transformers(folder: Path, seed: int, images: Path, **settings: Any) -> Path:
    """A parent as a stranger saves it: `save_pretrained` of the model and of the image processor."""
    torch.manual_seed(seed)
    channels = len(settings.get("image_mean", IMAGENET["image_mean"]))
    transformers.ViTImageProcessor(
        **{
            **IMAGENET,
            "size": {"shortest_edge": 18},
            "do_center_crop": True,
            "crop_size": 16,
            "resample": 3,
            **settings,
        }
    ).save_pretrained(folder)
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        num_channels=channels, id2label=dict(enumerate(sorted(CLASSES))), hidden_dropout_prob=0.0,
        label2id={name: number for number, name in enumerate(sorted(CLASSES))},
    )  # fmt: skip
    mode = "L" if channels == 1 else "RGB"
    model = learned(transformers.ViTForImageClassification(config), images, by_transformers(folder), mode)
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def of_timm(folder: Path, seed: int, images: Path) -> Path:
    """The same of timm, which keeps how images are prepared in `pretrained_cfg`."""
    torch.manual_seed(seed)
    model: Any = timm.create_model(
        "deit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=3
    )
    cfg = resolve_data_config({"input_size": (3, 16, 16), "crop_pct": 0.9}, model=model)
    model.pretrained_cfg |= cfg
    learned(model, images, create_transform(**cfg))  # type: ignore[arg-type]
    timm.models.save_for_hf(model, str(folder), model_config={"label_names": sorted(CLASSES)}, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def parents(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    home = tmp_path_factory.mktemp("parents")
    return {
        "transformers": [of_transformers(home / f"hf-{seed}", seed, images) for seed in (1, 2)],
        "timm": [of_timm(home / f"timm-{seed}", seed, images) for seed in (1, 2)],
        "other": [of_transformers(home / "half", 3, images, image_mean=[0.1, 0.2, 0.3], image_std=[0.9, 0.8, 0.7])],
    }


def rows(folder: Path) -> dict[str, float]:
    return {row.name: float(row.accuracy or 0) for row in Report.load(folder / "report").rows}


def run(command: Any, *argv: object) -> int:
    return main(command.run, [str(word) for word in argv])


@pytest.mark.parametrize("library", [pytest.param("transformers", marks=pytest.mark.slow), "timm"])
def test_what_is_reported_is_what_their_own_processor_gives(
    library: str, parents: dict[str, list[Path]], images: Path, tmp_path: Path
) -> None:
    """The parents, the fused and the finetuned model: in the report as through the files in their own folders."""
    first, second = parents[library]
    prepare, fused = {"transformers": by_transformers, "timm": by_timm}[library], tmp_path / "fused"
    assert run(fuse, "--parents", first, second, "--data.path", images, "--output", fused, *QUIET, *CPU) == 0
    found = rows(fused)
    for path in (first, second):
        own = accuracy(load_model(path), images, prepare(path))
        assert own > 0.85
        assert found[f"parent {path.name}"] == pytest.approx(own, abs=1e-6)
    assert found["fused"] == pytest.approx(accuracy(load_model(fused), images, prepare(fused / "model")), abs=1e-6)
    assert image_processing(fused) == image_processing(first)

    assert run(evaluate, "--models", first, fused, "--data.path", images, "--output", tmp_path / "e", *QUIET) == 0
    measured = rows(tmp_path / "e")
    assert measured[f"model {first.name}"] == found[f"parent {first.name}"]
    assert measured["model fused"] == found["fused"]

    more = ["--output", tmp_path / "f", "--trainer.max_epochs", "1", "--baselines", "false"]
    assert run(finetune, "--model", fused, *more, *QUIET, *CPU) == 0
    tuned = next(row for row in Report.load(fused / "report").rows if row.stage == "finetuned")
    again = accuracy(load_model(tmp_path / "f"), images, prepare(tmp_path / "f" / "model"))
    assert tuned.accuracy == pytest.approx(again, abs=1e-6)
    assert image_processing(tmp_path / "f") == image_processing(first)


def test_parents_of_two_normalisations_are_measured_as_they_are(
    parents: dict[str, list[Path]], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also beside a preset with another anchor, and as baselines of a finetuning."""
    first, other = parents["transformers"][0], parents["other"][0]
    own = {path.name: accuracy(load_model(path), images, by_transformers(path)) for path in (first, other)}
    given, fused = ["--parents", first, other, "--data.path", images, *QUIET, *CPU], tmp_path / "fused"
    preset = tmp_path / "second.yaml"
    preset.write_text("anchor: 1\nrefit: {method: none}\n")
    assert run(fuse, *given, "--compare", preset, "--output", fused) == 0
    assert capsys.readouterr().out.count("half: trained on images of mean 0.1, 0.2, 0.3") == 1
    found = rows(fused)
    assert {name: found[f"parent {name}"] for name in own} == pytest.approx(own, abs=1e-6)
    whole = accuracy(load_model(fused), images, by_transformers(fused / "model"))
    assert found["fused"] == pytest.approx(whole, abs=1e-6)
    assert run(evaluate, "--models", first, other, "--data.path", images, "--output", tmp_path / "e", *QUIET) == 0
    assert {name: rows(tmp_path / "e")[f"model {name}"] for name in own} == pytest.approx(own, abs=1e-6)
    assert run(sweep, *given, "--output", tmp_path / "s", "--sweep", "align.reg=0.05") == 0
    assert {name: rows(tmp_path / "s")[f"parent {name}"] for name in own} == pytest.approx(own, abs=1e-6)
    assert run(finetune, "--model", fused, "--output", tmp_path / "f", "--trainer.max_epochs", "0", *QUIET, *CPU) == 0


def test_a_users_word_stands_for_all(parents: dict[str, list[Path]], images: Path, tmp_path: Path) -> None:
    first, other = parents["transformers"][0], parents["other"][0]
    given = ["--parents", first, other, "--data.path", images, *QUIET, *CPU, "--report", "rows"]
    assert run(fuse, *given, "--data.normalize", "half", "--output", tmp_path / "fused") == 0
    half = transformers.AutoImageProcessor.from_pretrained(tmp_path / "fused" / "model")
    assert (list(half.image_mean), list(half.image_std)) == ([0.5] * 3, [0.5] * 3)
    prepare, found = by_transformers(tmp_path / "fused" / "model"), rows(tmp_path / "fused")
    for path in (first, other):
        assert found[f"parent {path.name}"] == pytest.approx(accuracy(load_model(path), images, prepare), abs=1e-6)
    assert found[f"parent {other.name}"] < 0.8


@pytest.mark.slow
def test_grey_images(images: Path, tmp_path: Path) -> None:
    settings = {"image_mean": [0.2], "image_std": [0.3]}
    first, second = (of_transformers(tmp_path / name, seed, images, **settings) for seed, name in enumerate("ab"))
    fused = tmp_path / "fused"
    assert run(fuse, "--parents", first, second, "--data.path", images, "--output", fused, *QUIET, *CPU) == 0
    found = rows(fused)
    for name, path in (("parent a", first), ("parent b", second), ("fused", fused / "model")):
        own = accuracy(load_model(path), images, by_transformers(path), "L")
        assert found[name] == pytest.approx(own, abs=1e-6)


@pytest.mark.parametrize("library", ["transformers", "timm"])
@pytest.mark.parametrize("normalize", [[], ["--data.normalize", "{mean: [0.3], std: [0.2]}"]], ids=["half", "own"])
def test_a_model_of_train_says_how_it_takes_images(
    library: str, normalize: list[str], images: Path, tmp_path: Path
) -> None:
    sizes = {
        "timm": "{img_size: 16, patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}",
        "transformers": "{image_size: 16, patch_size: 8, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, "
        "num_attention_heads: 2}",
    }
    name = {"timm": "vit_tiny_patch16_224", "transformers": "ViTForImageClassification"}[library]
    folder = tmp_path / "run"
    assert run(
        train, "--model.library", library, "--model.architecture", name, "--model.args", sizes[library], "--data.path",
        images, "--data.image_size", 16, "--data.batch_size", 30, "--trainer.max_epochs", 1, "--output", folder, *QUIET,
        *CPU, *normalize,
    ) == 0  # fmt: skip
    prepare = {"transformers": by_transformers, "timm": by_timm}[library](folder / "model")
    (file, *_) = sorted((images / "test" / "bright").glob("*"))
    mean, std = (0.3, 0.2) if normalize else (0.5, 0.5)
    plain = torch.from_numpy(np.array(Image.open(file).resize((16, 16), 2))).permute(2, 0, 1) / 255
    assert torch.allclose(prepare(Image.open(file)), (plain - mean) / std, atol=2.1 / 255 / std)
    data = ImageDataModule(DataConfig(path=str(images)))
    data.follow(load_model(folder), image_processing(folder))
    assert data.processing.sees_as(image_processing(folder) or data.processing)
    assert data.processing.size == (16, 16)
    assert data.processing.crop is None


def test_mistakes_are_one_line(
    parents: dict[str, list[Path]], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--parents", *parents["transformers"], "--data.path", images, *QUIET, *CPU, "--output", tmp_path / "x"]
    for option, words in {
        "imagnet": "data.normalize: there is no 'imagnet'; did you mean 'imagenet'?; use auto,",
        "{mean: [0.5]}": "give mean and std, of one number or of one for each channel",
        "{mean: [0.5, 0.5], std: [1, 1]}": "give mean and std, of one number or of one for each channel",
        "{mean: [0.5], std: [0]}": "data.normalize: std must be above 0",
    }.items():
        assert run(fuse, *given, "--data.normalize", option) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert words in lines[0]
