"""Tiny run folders on disk, as train.py leaves them, without the training."""

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml

from fusionpl.models.build import build_model
from fusionpl.models.config import ModelConfig
from fusionpl.models.save import save_model

DATA = {"path": "digits", "image_size": 16, "channels": 1, "batch_size": 50, "train_limit": 100}
ARGS = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
NAMES = tuple("0123456789")


def make_run(
    folder: Path, seed: int, names: tuple[str, ...] = NAMES, data: Mapping[str, Any] | None = None, **args: int
) -> Path:
    torch.manual_seed(seed)
    config = ModelConfig("timm", "vit_tiny_patch16_224", {**ARGS, **args}, initializer_range=0.2)
    save_model(build_model(config, num_classes=len(names), class_names=names), folder / "model")
    settings = {"name": "tiny", "data": {**DATA, **(data or {})}, "trainer": {"max_epochs": 10}, "seed": seed}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def hears_ctrl_c() -> None:
    """For Popen's preexec_fn: a shell's background job, and what it starts, would ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


WORDS = ("red", "green", "cat", "dog", "runs", "sleeps", "under", "over", "the", "bridge", "house", "tree", "quickly")


def make_corpus(folder: Path, splits: tuple[str, ...] = ("train", "test"), documents: int = 120) -> Path:
    """A folder of parquet files with two columns of text: sentences of a few words in an order that repeats."""
    for number, split in enumerate(splits):
        generator = torch.Generator().manual_seed(number)
        rows = [
            " ".join(WORDS[(start + step * 3) % len(WORDS)] for step in range(20)) + "."
            for start in torch.randint(len(WORDS), (documents,), generator=generator).tolist()
        ]
        titles = [f"title {index}" for index in range(documents)]
        datasets.Dataset.from_dict({"text": rows, "title": titles}).to_parquet(folder / f"{split}.parquet")
    return folder


def make_sentences(folder: Path, *, text: str = "sentence", validation: bool = False, train: int = 160) -> Path:
    """A folder of parquet files of sentences labelled 1 where they have a cat, else 0."""
    for number, (split, count) in enumerate({"train": train, "test": 60, "validation": 40}.items()):
        if split == "validation" and not validation:
            continue
        generator = torch.Generator().manual_seed(number)
        rows = [
            " ".join(WORDS[index] for index in torch.randint(len(WORDS), (6,), generator=generator).tolist())
            for _ in range(count)
        ]
        labels = [int("cat" in row.split()) for row in rows]
        datasets.Dataset.from_dict({text: rows, "label": labels}).to_parquet(folder / f"{split}.parquet")
    return folder
