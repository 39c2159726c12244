from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from fusionpl.datamodules import config
from fusionpl.datamodules.base import ShareSampler
from fusionpl.datamodules.config import DataConfig
from fusionpl.datamodules.images import ImageDataModule, augment, size_of
from fusionpl.errors import FusionError
from fusionpl.models.build import build_model
from fusionpl.models.config import ModelConfig
from fusionpl.models.images import channels_of
from fusionpl.models.preprocessing import NORMALIZATIONS
from tests.models_for_tests import hf_vit, text_model, timm_vit

PARTS = ("train", "validation", "calibration", "test")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(data: ImageDataModule, part: str) -> list[bytes]:
    found = data.dataset(part)
    return [
        pixels.numpy().tobytes() + bytes([label])
        for pixels, label in zip(found.pixels, found.labels.tolist(), strict=True)
    ]


def order(data: ImageDataModule, epoch: int = 0) -> list[int]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return list(loader.sampler)


def test_the_digits_are_dealt_out_once_each() -> None:
    data = ImageDataModule(DataConfig(image_size=8))
    assert [len(data.dataset(part)) for part in PARTS] == [1000, 200, 197, 400]
    dealt = sorted(row for part in PARTS for row in rows(data, part))
    raw = load_digits()
    scans = np.round(raw.images * 255 / 16).astype(np.uint8)
    assert dealt == sorted(scan.tobytes() + bytes([label]) for scan, label in zip(scans, raw.target, strict=True))


def test_every_digit_is_in_every_part() -> None:
    data = ImageDataModule(DataConfig())
    for part in PARTS:
        shares = torch.bincount(data.dataset(part).labels) / len(data.dataset(part))
        assert shares.numel() == 10
        assert shares.sub(0.1).abs().max() < 0.01, part


def test_a_batch_holds_pixels_from_minus_one_to_one() -> None:
    batch = next(iter(ImageDataModule(DataConfig(channels=3, image_size=32)).train_dataloader()))
    assert batch["pixel_values"].shape == (16, 3, 32, 32)
    assert batch["pixel_values"].dtype == torch.float32
    assert (batch["pixel_values"].min(), batch["pixel_values"].max()) == (-1.0, 1.0)
    assert batch["labels"].dtype == torch.int64


def test_no_seed_changes_a_split_but_it_changes_the_order() -> None:
    first, other = ImageDataModule(DataConfig(), seed=1), ImageDataModule(DataConfig(), seed=2)
    assert all(rows(first, part) == rows(other, part) for part in PARTS)
    assert order(first) == order(ImageDataModule(DataConfig(), seed=1))
    assert order(first) != order(other)
    assert order(first, epoch=0) != order(first, epoch=1)
    assert sorted(order(first)) == list(range(1000))


def test_a_limit_leaves_the_other_parts_alone() -> None:
    whole, limited = ImageDataModule(DataConfig()), ImageDataModule(DataConfig(train_limit=100))
    assert len(limited.dataset("train")) == 100
    assert set(rows(limited, "train")) <= set(rows(whole, "train"))
    assert all(rows(limited, part) == rows(whole, part) for part in PARTS[1:])


def test_making_a_loader_draws_nothing_from_the_global_rng() -> None:
    data = ImageDataModule(DataConfig())
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    next(iter(data.train_dataloader()))
    next(iter(data.calibration_dataloader()))
    assert torch.equal(torch.rand(1), expected)


def test_a_shift_moves_whole_images_and_fills_with_black() -> None:
    pixels = torch.full((400, 2, 9, 9), -1.0)
    pixels[:, 0, 4, 4], pixels[:, 1, 4, 4] = 1.0, 0.5
    moved = augment(pixels, 2, False, torch.tensor(-1.0))
    assert torch.equal(moved.sum((2, 3)), pixels.sum((2, 3)))
    places = (moved[:, 0] == 1.0).nonzero()[:, 1:]
    assert torch.equal((moved[:, 1] == 0.5).nonzero()[:, 1:], places)
    assert {tuple(place) for place in places.tolist()} == {(row, col) for row in range(2, 7) for col in range(2, 7)}


def test_a_flip_mirrors_about_half_of_the_images() -> None:
    pixels = torch.arange(12.0).view(1, 1, 3, 4).expand(400, -1, -1, -1)
    flipped = augment(pixels, 0, True, torch.tensor(-1.0))
    mirrored = (flipped == pixels.flip(-1)).all(dim=(1, 2, 3))
    assert ((flipped == pixels).all(dim=(1, 2, 3)) | mirrored).all()
    assert 150 < int(mirrored.sum()) < 250
    assert torch.equal(augment(pixels, 0, False, torch.tensor(-1.0)), pixels)


def test_ranks_share_an_odd_number_of_images_without_repeating_one() -> None:
    data = ImageDataModule(DataConfig()).dataset("calibration")
    shares = [list(ShareSampler(data, num_replicas=2, rank=rank)) for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == list(range(197))
    assert [len(ShareSampler(data, num_replicas=2, rank=rank)) for rank in (0, 1)] == [99, 98]


@pytest.mark.parametrize("size", [2, 14, 49, 98, 256])
def test_ranks_run_equally_many_batches(size: int) -> None:
    class Calibrated(ImageDataModule):
        evaluation_batch = size

        def dataset(self, part: str) -> Any:
            return super().dataset("calibration")

    loaders = []
    for rank in (0, 1):
        data = Calibrated(DataConfig())
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)  # type: ignore[assignment]
        loaders.append(data.test_dataloader())
    assert len(loaders[0]) == len(loaders[1])
    assert sum(len(batch["labels"]) for loader in loaders for batch in loader) == 197
    data.trainer = SimpleNamespace(world_size=198, global_rank=0)  # type: ignore[assignment]
    with pytest.raises(FusionError, match="the test data are 197 samples, too few for 198 processes"):
        data.test_dataloader()


def colours(count: int, size: int = 8) -> dict[str, list[Any]]:
    """Pictures of one colour each; red stands for label 1, green for label 0."""
    images = [Image.new("RGB", (size, size), (255, 0, 0) if index % 2 else (0, 255, 0)) for index in range(count)]
    return {"picture": images, "kind": [index % 2 for index in range(count)]}


def parquet(folder: Path, label: Any, **splits: dict[str, list[Any]]) -> DataConfig:
    features = datasets.Features({"picture": datasets.Image(), "kind": label})
    folder.mkdir(exist_ok=True)
    for split, columns in splits.items():
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    return DataConfig(path=str(folder), image_size=4, channels=3, batch_size=4, validation=4, calibration=4)


def test_a_folder_of_parquet_files(tmp_path: Path) -> None:
    label = datasets.ClassLabel(names=["green", "red"])
    data = ImageDataModule(parquet(tmp_path / "colours", label, train=colours(20), test=colours(6)))
    assert data.class_names == ("green", "red")
    assert [len(data.dataset(part)) for part in PARTS] == [12, 4, 4, 6]
    for part in PARTS:
        found = data.dataset(part)
        assert found.pixels.shape[1:] == (3, 4, 4)
        assert torch.equal(found.pixels[:, 0].amax((1, 2)) == 255, found.labels == 1), part
    grey = ImageDataModule(DataConfig(path=data.config.path, image_size=8, channels=1, validation=4, calibration=4))
    assert grey.dataset("test").pixels.shape == (6, 1, 8, 8)


def test_a_validation_split_of_its_own_is_used(tmp_path: Path) -> None:
    config = parquet(tmp_path / "d", datasets.Value("int64"), train=colours(20), validation=colours(8), test=colours(6))
    data = ImageDataModule(config)
    assert data.class_names == ("0", "1")
    assert [len(data.dataset(part)) for part in PARTS] == [16, 8, 4, 6]


def test_a_missing_training_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ImageDataModule(parquet(tmp_path / "d", datasets.Value("int64"), test=colours(20)))
    assert [len(data.dataset(part)) for part in PARTS] == [8, 4, 4, 4]
    assert "d: no train split; test is used as one" in capsys.readouterr().out
    both = ImageDataModule(parquet(tmp_path / "e", datasets.Value("int64"), validation=colours(20), test=colours(6)))
    assert [len(both.dataset(part)) for part in PARTS] == [12, 4, 4, 6]
    for split in ("one", "two"):
        (tmp_path / "f").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(colours(4)).to_parquet(tmp_path / f"f/{split}.parquet")
    (tmp_path / "f" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: one, path: one.parquet}\n"
        "  - {split: two, path: two.parquet}\n---\n"
    )
    with pytest.raises(FusionError, match="has no train split; it has one, two"):
        ImageDataModule(DataConfig(path=str(tmp_path / "f"))).dataset("train")


def test_a_missing_test_split_is_cut_from_the_training_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = parquet(tmp_path / "d", datasets.Value("int64"), train=colours(40))
    first, again = (ImageDataModule(config, seed) for seed in (0, 1))
    assert [len(first.dataset(part)) for part in PARTS] == [24, 4, 4, 8]
    assert "no test split; 8 of 40 training samples are it" in capsys.readouterr().out
    torch.testing.assert_close(first.dataset("test").pixels, again.dataset("test").pixels)
    assert sorted(first.dataset("test").labels.tolist()) == [0] * 4 + [1] * 4


FLAWS: dict[str, tuple[dict[str, Any], str]] = {
    "a corrupt image": (
        {"picture": {"bytes": b"no image", "path": None}},
        "column 'picture' holds an image that can't",
    ),
    "no image": ({"picture": None}, "column 'picture' holds no image"),
    "no label": ({"kind": None}, "column 'kind' holds no label"),
    "a label below 0": ({"kind": -1}, "column 'kind' holds the label -1, which is none"),
}


@pytest.mark.parametrize("name", FLAWS)
def test_a_row_that_is_no_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    changes, words = FLAWS[name]
    whole = datasets.Dataset.from_dict(
        colours(20), features=datasets.Features(picture=datasets.Image(), kind=datasets.Value("int64"))
    )
    rows = whole.cast_column("picture", datasets.Image(decode=False)).to_list()
    rows[7] |= changes
    (tmp_path / "d").mkdir()
    for split in ("train", "test"):
        made = datasets.Dataset.from_list(rows if split == "train" else rows[:6], features=whole.features)
        made.to_parquet(tmp_path / f"d/{split}.parquet")
    config = DataConfig(path=str(tmp_path / "d"), image_size=8, channels=3, validation=4, calibration=4)

    def parts(config: DataConfig) -> list[int]:
        data = ImageDataModule(config)
        return [len(data.dataset(part)) for part in PARTS]

    with pytest.raises(FusionError, match=f"split train, row 7: {words}.*; mend it, or leave such rows out with"):
        parts(config)
    assert sum(parts(replace(config, skip_corrupt=True))) == 25
    summary = capsys.readouterr().out
    assert "rows of train are left out, the first is 7" in summary or "1 of " in summary


def test_a_single_class(tmp_path: Path) -> None:
    one = {**colours(8), "kind": [0] * 8}
    with pytest.raises(FusionError, match="has a single class in column 'kind'"):
        ImageDataModule(parquet(tmp_path / "d", datasets.Value("int64"), train=one, test=one)).dataset("train")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"text": ["a", "b"], "label": [0, 1]}, "has no image column; its columns are text, label"),
        ({"picture": colours(2)["picture"]}, "has no label column; its columns are picture"),
    ],
)
def test_a_missing_column(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(FusionError, match=words):
        ImageDataModule(DataConfig(path=str(tmp_path), channels=3)).dataset("train")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": "./nowhere"}, "no data set at nowhere; --data.path takes"),
        ({"channels": 2}, "data.channels must be 1 or 3, not 2"),
        ({"validation": -1}, "data.validation is -1; it must be 0 or more"),
        ({"on_device": True, "num_workers": 2}, "data.on_device needs data.num_workers 0, not 2"),
    ],
)
def test_a_config_that_cannot_be_served(options: dict[str, Any], words: str) -> None:
    with pytest.raises(FusionError, match=words):
        ImageDataModule(DataConfig(**options)).train_dataloader()


def test_options_name_every_normalisation() -> None:
    assert set(config.NORMALIZATIONS) == set(NORMALIZATIONS)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: text_model("bert masked-lm"), "a BertForMaskedLM reads input_ids, but 'digits' gives pixel_values"),
        (lambda: timm_vit(), "the VisionTransformer can't read the data of 'digits': Input height"),
        (lambda: hf_vit(), "the ViTForImageClassification can't read the data of 'digits': "),
    ],
    ids=["text model", "other size", "other channels"],
)
def test_a_model_that_cannot_read_the_data_is_named(model: Any, message: str) -> None:
    with pytest.raises(FusionError) as caught:
        ImageDataModule(DataConfig(image_size=32)).check_model(model())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_of_other_classes_is_named() -> None:
    with pytest.raises(
        FusionError, match=r"puts out 5 numbers a sample, which does not fit the 10 classes of 'digits'"
    ):
        ImageDataModule(DataConfig(image_size=16, channels=3)).check_model(timm_vit())


def by_class(folder: Path, count: int = 10, classes: tuple[str, ...] = ("cat", "dog"), picture: Any = None) -> Path:
    """A folder of PNGs with a folder for each class."""
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            (picture or Image.new("RGB", (8, 8), (200, 100, 50))).save(folder / name / f"{index}.png")
    return folder


def folder_of(path: Path, **options: Any) -> ImageDataModule:
    return ImageDataModule(DataConfig(path=str(path), **{"image_size": 8, **options}))


def test_few_images_are_shared_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = by_class(tmp_path / "images", 30)
    for other in (".DS_Store", "README.md", "notes.txt"):
        (path / other).write_text("?")
    data = folder_of(path)
    assert data.class_names == ("cat", "dog")
    assert [len(data.dataset(part)) for part in PARTS] == [28, 10, 10, 12]
    assert (
        "images: 48 training samples, too few for data.calibration 197 and data.validation 200: 10 for calibration, "
        "10 for validation; these options take other numbers"
    ) in capsys.readouterr().out
    # numbers that are no defaults are taken as long as something is left
    assert [len(folder_of(path, calibration=40, validation=5).dataset(part)) for part in PARTS] == [3, 5, 40, 12]
    assert [len(folder_of(path, calibration=48, validation=5).dataset(part)) for part in PARTS] == [33, 5, 10, 12]
    assert [len(folder_of(path, calibration=0, validation=60).dataset(part)) for part in PARTS] == [38, 10, 0, 12]


def test_one_image_for_each_class(tmp_path: Path) -> None:
    data = folder_of(by_class(tmp_path / "three", 1, ("a", "b", "c")))
    assert [len(data.dataset(part)) for part in PARTS] == [1, 0, 1, 1]
    data = folder_of(by_class(tmp_path / "two", 1))
    assert [len(data.dataset(part)) for part in PARTS] == [1, 0, 1, 0]


def test_folders_by_split_and_class(tmp_path: Path) -> None:
    by_class(tmp_path / "images" / "train", 20)
    by_class(tmp_path / "images" / "test", 3)
    data = folder_of(tmp_path / "images", validation=6, calibration=8)
    assert [len(data.dataset(part)) for part in PARTS] == [26, 6, 8, 6]
    (tmp_path / "flat").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "flat" / "1.png")
    with pytest.raises(FusionError, match="its columns are image; put images into a folder for each class"):
        folder_of(tmp_path / "flat").dataset("train")


PICTURES: dict[str, tuple[Image.Image, int, list[float]]] = {
    "grey": (Image.new("L", (8, 8), 77), 1, [77]),
    "black and white": (Image.new("1", (8, 8), 1), 1, [255]),
    "grey of 16 bits": (Image.fromarray(np.full((8, 8), 20000, np.uint16)), 1, [78]),
    "grey with alpha": (Image.new("LA", (8, 8), (70, 100)), 1, [70]),
    "RGB": (Image.new("RGB", (8, 8), (200, 100, 50)), 3, [200, 100, 50]),
    "RGBA": (Image.new("RGBA", (8, 8), (200, 100, 50, 128)), 3, [200, 100, 50]),
    "palette": (
        Image.new("RGB", (8, 8), (200, 100, 50)).convert("P", palette=Image.Palette.ADAPTIVE), 3, [200, 100, 50],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_images_have_the_channels_of_their_files(name: str, tmp_path: Path) -> None:
    picture, channels, means = PICTURES[name]
    path = by_class(tmp_path / "images", picture=picture)
    data = folder_of(path)
    assert data.channels == channels
    assert data.model_args() == {"channels": channels}
    assert data.dataset("train").pixels.float().mean((0, 2, 3)).tolist() == means
    assert folder_of(path, channels=4 - channels).dataset("train").pixels.shape[1] == 4 - channels


def test_one_colour_image_makes_all_colour(tmp_path: Path) -> None:
    path = by_class(tmp_path / "images", picture=Image.new("L", (8, 8), 9))
    (path / "cat" / "0.png").write_bytes(b"no image")
    assert folder_of(path).channels == 1
    Image.new("RGB", (8, 8)).save(path / "dog" / "9.png")
    assert folder_of(path).channels == 3


def test_a_turned_photo_stands_upright(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0] = 255
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        picture = Image.fromarray(pixels)
        exif = picture.getexif()
        exif[274] = 6  # taken with the camera turned: the first row is the right side
        for index in range(4):
            picture.save(tmp_path / "images" / name / f"{index}.png", exif=exif)
    found = folder_of(tmp_path / "images").dataset("train").pixels
    assert (found[..., -1] == 255).all()
    assert (found[..., :-1] == 0).all()


@pytest.mark.parametrize("model", [hf_vit(), timm_vit()], ids=["transformers", "timm"])
def test_size_and_channels_are_the_models_where_options_leave_them_open(model: Any, tmp_path: Path) -> None:
    data = ImageDataModule(DataConfig(path=str(by_class(tmp_path / "grey", picture=Image.new("L", (9, 9), 5)))))
    data.follow(model)
    assert data.dataset("test").pixels.shape[1:] == (3, 16, 16)
    given = ImageDataModule(DataConfig(channels=1, image_size=16))
    with pytest.raises(FusionError, match=r"reads images of 3 channels, but data.channels is 1; leave data.channels"):
        given.check_model(model)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_model_is_built_for_the_channels_of_the_images(library: Any) -> None:
    timm = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1}
    hf = {"image_size": 16, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    name, args, key = {
        "timm": ("vit_tiny_patch16_224", timm, "in_chans"),
        "transformers": ("ViTForImageClassification", hf, "num_channels"),
    }[library]
    for own, wanted in (({}, 1), ({key: 3}, 3)):
        model = build_model(ModelConfig(library, name, {**args, **own}), num_classes=10, args={"channels": 1})
        assert channels_of(model) == wanted
        assert size_of(model) == 16
