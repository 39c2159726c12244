"""Tiny run folders on disk, as train.py leaves them, without the training."""

import signal
from pathlib import Path

import torch
import yaml

from fusionpl.models import ModelConfig, build_model, save_model

DATA = {"path": "digits", "image_size": 16, "channels": 1, "batch_size": 50, "train_limit": 100}
ARGS = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
NAMES = tuple("0123456789")


def make_run(folder: Path, seed: int, names: tuple[str, ...] = NAMES, **args: int) -> Path:
    torch.manual_seed(seed)
    config = ModelConfig("timm", "vit_tiny_patch16_224", {**ARGS, **args}, initializer_range=0.2)
    save_model(build_model(config, num_classes=10, class_names=names), folder / "model")
    settings = {"name": "tiny", "data": DATA, "trainer": {"max_epochs": 10}, "seed": seed}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def hears_ctrl_c() -> None:
    """For Popen's preexec_fn: a shell's background job, and what it starts, would ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
