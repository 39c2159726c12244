"""What the owner of parents could do in a fusion's time instead: teach the best of them, or train it on."""

from collections.abc import Sequence
from typing import Any

import torch
import yaml
from torch import nn

from fusionpl.cli.alternatives import TRAINED_ON
from fusionpl.datamodules.base import FixedSplits
from fusionpl.presets import CONF
from fusionpl.training.budget import Trained, train_for
from fusionpl.training.config import OptimConfig
from fusionpl.training.distillation import Distillation, UnlabelledData
from fusionpl.training.module import ClassificationModule

SEED = 0


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
