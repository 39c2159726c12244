"""`fuse.py --compare`: what stands beside the fused model, other presets and what their owner could do instead."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from fusionpl.datamodules.base import FixedSplits
from fusionpl.errors import FusionError, nearest
from fusionpl.fusion.config import FuseConfig, load_config
from fusionpl.presets import CONF, preset, presets
from fusionpl.training.budget import Trained, train_for
from fusionpl.training.distillation import Distillation, UnlabelledData
from fusionpl.training.module import ClassificationModule, OptimConfig

DISTILLED, TRAINED_ON = "distilled", "trained-on"
ALTERNATIVES = (DISTILLED, TRAINED_ON)
SEED = 0


def compared(words: Sequence[str]) -> tuple[dict[str, FuseConfig], list[str]]:
    """What `--compare` names: row -> configuration of a preset, and alternatives.

    Raises:
        FusionError: it is neither an alternative nor a file, or the file is no preset.
    """
    found = {}
    for word in words:
        if word in ALTERNATIVES:
            continue
        known = [*ALTERNATIVES, *presets("fuse")]
        if word not in known and not Path(word).is_file():
            raise FusionError(
                f"--compare: there is no '{word}'{nearest(word, known)}; use {', '.join(known)}, or a file of your own"
            )
        file = preset("fuse", word)
        found[f"fused ({file.stem})"] = load_config(file)
    return found, [name for name in ALTERNATIVES if name in words]


def alternative(
    name: str,
    student: nn.Module,
    parents: Sequence[nn.Module],
    data: FixedSplits,
    *,
    samples: int,
    seconds: float,
    trainer_args: dict[str, Any],
) -> Trained:
    """The best parent, trained for a while with the optimiser of conf/finetune/default.yaml.

    Args:
        name: `distilled` draws it to the mean of all parents' probabilities on the calibration data, whose labels are
            not read; `trained-on` trains it on the labels of the training data.
        student: the best parent, trained in place, in float32.
        parents: all of them.
        data: of the parents.
        samples: of the calibration data, at most; as many as the fusion had.
        seconds: wall time.
        trainer_args: where, and in which precision.

    Raises:
        FusionError: the loss is not finite.
    """
    preset = yaml.safe_load((CONF / "finetune" / "default.yaml").read_text())
    optim = OptimConfig(**preset["optim"])
    arguments = {**trainer_args, "gradient_clip_val": preset["trainer"]["gradient_clip_val"]}
    student = student.float()
    torch.manual_seed(SEED)
    if name == TRAINED_ON:
        module = ClassificationModule(student, optim, data.num_classes, (), seconds=seconds)
        return train_for(module, data, seed=SEED, trainer_args=arguments)
    taught = Distillation(student, optim, data.num_classes, teachers=parents, labels=False, seconds=seconds)
    unlabelled = UnlabelledData(data, samples, data.config.batch_size, SEED)
    return train_for(taught, unlabelled, seed=SEED, trainer_args=arguments)
