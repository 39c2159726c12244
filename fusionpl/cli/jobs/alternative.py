"""What the owner of parents could do in a fusion's time instead: teach the best of them, or train it on."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from time import monotonic
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Timer
from torch import nn

from fusionpl.calibration.forward import device_of
from fusionpl.cli.alternatives import DISTILLED
from fusionpl.cli.jobs.parents import Job
from fusionpl.datamodules.base import FixedSplits, calibration_of
from fusionpl.evaluation.bench import Cost, Made
from fusionpl.evaluation.measuring import Alternative
from fusionpl.fusion.methods.refinement import teach_parent
from fusionpl.models.classes import whole_heads
from fusionpl.presets import CONF
from fusionpl.training.callbacks import SeedEpochs
from fusionpl.training.config import OptimConfig
from fusionpl.training.module import ClassificationModule

SEED = 0


def alternatives(job: Job, seconds: float) -> dict[str, Alternative]:
    """What `--compare` asks for besides other fusions: row -> what makes it.

    Args:
        job: what was asked for.
        seconds: wall time that each may take.
    """

    def make(name: str, best: int, parents: Sequence[nn.Module]) -> Made:
        print(f"{name}: the best parent for {seconds:.0f} s")
        if name == DISTILLED:
            return distilled(job, seconds, best, parents)
        given = {key: job.asked.args.trainer[key] for key in ("accelerator", "precision")}
        return trained_on(job.data, seconds, given, parents[best])

    return {name: partial(make, name) for name in job.asked.alternatives}


def distilled(job: Job, seconds: float, best: int, parents: Sequence[nn.Module]) -> Made:
    """The best parent, drawn to the mean of all parents' probabilities by learned refinement, on the same data.

    Args:
        job: whose `refine` says how; its start, steps and minutes do not count.
        seconds: wall time.
        best: the index of the best parent.
        parents: all of them.

    Raises:
        FusionError: too few samples to hold one out.
    """
    started, config = monotonic(), job.asked.config
    taught = teach_parent(
        best, parents, job.votings, calibration_of(job.data, config.calibration),
        replace(config.refine, method="gradient", steps=None, minutes=seconds / 60),
        family=job.team.binding.family, more=job.data.unlabelled_dataloader(), augment=job.data.augmented,
        seed=job.asked.args.seed,
    )  # fmt: skip
    print(f"distilled: {taught.summary}")
    return taught.model, Cost("unlabelled data", monotonic() - started, taught.steps)


def trained_on(data: FixedSplits, seconds: float, trainer_args: Mapping[str, Any], best: nn.Module) -> Made:
    """The best parent, trained on the labels of the training data on one device, as conf/finetune/default.yaml says.

    The batch that is running when the time is over is finished. How many steps fit into it, and the learning rate of
    each, depend on the machine: such a result does not repeat number for number.

    Args:
        data: of the parents; its training batches are iterated as often as there is time.
        seconds: wall time.
        trainer_args: where, and in which precision.
        best: the best parent; a copy in float32 is trained.

    Raises:
        FusionError: the loss is not finite.
    """
    preset = yaml.safe_load((CONF / "finetune" / "default.yaml").read_text())
    optim = OptimConfig(**preset["optim"])
    student = whole_heads(copy.deepcopy(best)).float().train()
    module = ClassificationModule(student, optim, data.num_classes, (), seconds=seconds)
    timer = Timer(timedelta(seconds=seconds), verbose=False)
    trainer = L.Trainer(
        **{**trainer_args, "devices": 1, "gradient_clip_val": preset["trainer"]["gradient_clip_val"]},
        max_epochs=-1,
        callbacks=[SeedEpochs(SEED), timer],
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    torch.manual_seed(SEED)
    trainer.fit(module, datamodule=data)
    cost = Cost("labels", timer.time_elapsed("train"), trainer.global_step)
    return module.whole().eval().to(device_of(best)), cost
