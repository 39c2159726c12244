"""Parents that know different things: teams, each parent with its own data and labels."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from benchmarks.common import DEVICE, Parents
from benchmarks.paper.scales import Lab
from fusionpl.datamodules.base import FixedSplits

# How many classes each parent of a team knows, in order.
CLASSES: Mapping[str, Sequence[int]] = {"5 and 5 classes": (5, 5), "four parents": (3, 2, 3, 2)}
DOMAINS = "two domains"
# Photographs that the model of digits takes, too; the budget is a third of the small scale's.
GREY = (
    "--data.path", "uoft-cs/cifar10", "--data.channels", "1", "--data.batch_size", "64", "--data.train_limit", "8000",
    "--data.validation", "2000", "--data.calibration", "788", "--data.flip", "true", "--trainer.max_epochs", "8",
)  # fmt: skip


@dataclass(frozen=True)
class TaskTeam:
    """Parents of different tasks.

    Attributes:
        runs: (parents, seed) of each.
    """

    runs: tuple[tuple[Parents, int], ...]

    @cached_property
    def models(self) -> list[nn.Module]:
        return [model.to(DEVICE) for parents, seed in self.runs for model in parents.models([seed])]

    @cached_property
    def data(self) -> list[FixedSplits]:
        """Each parent's own."""
        return [parents.data(seed) for parents, seed in self.runs]


def teams(lab: Lab) -> Iterator[tuple[str, str, TaskTeam]]:
    """What the parents of a team know, its number, and the team."""
    for first, _ in lab.scale.pairs:
        for name, counts in CLASSES.items():
            if lab.scale.tasks and name in lab.scale.tasks:
                yield name, str(first), _of_classes(lab, counts, first)
        if DOMAINS in lab.scale.tasks:
            grey = list(GREY)
            if "cifar10" in lab.paths:
                grey[1] = lab.paths["cifar10"]
            digits = lab.parents("digits-many", "--data.calibration", "788", "--data.validation", "100")
            yield DOMAINS, str(first), TaskTeam(((lab.parents("grey", *grey), first), (digits, first + 1)))


def _of_classes(lab: Lab, counts: Sequence[int], first: int) -> TaskTeam:
    runs, start = [], 0
    for at, count in enumerate(counts):
        classes = f"[{','.join(map(str, range(start, start + count)))}]"
        options = ["--data.classes", classes]
        if lab.scale.train_limit is not None:
            options += ["--data.train_limit", str(lab.scale.train_limit * count // 10)]
        group = f"classes-{start}-to-{start + count - 1}"
        runs.append((lab.parents(group, *options), first + at))
        start += count
    return TaskTeam(tuple(runs))
