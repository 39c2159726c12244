"""Parents that know different things: teams in which each has its own data and labels."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from torch import nn

from benchmarks.common import DEVICE, JOINT, TRANSPORT, Figures, Maker, Parents, plain_average
from benchmarks.paper.cells import Cell
from benchmarks.paper.scales import Lab
from fusionpl.calibration.cursor import CalibrationSet
from fusionpl.datamodules.base import calibration_of
from fusionpl.datamodules.joint import JointSplits
from fusionpl.datamodules.labelled import LabelledSplits
from fusionpl.evaluation.joint import Outputs, on_each
from fusionpl.evaluation.metrics import evaluate, together
from fusionpl.fusion.config import FuseConfig, RefineConfig, load_config
from fusionpl.fusion.fuse import fuse
from fusionpl.fusion.heads import HeadFit
from fusionpl.fusion.methods.refinement import teach_parent
from fusionpl.fusion.voting import Voting
from fusionpl.models.classes import united, with_classes_of
from fusionpl.models.resized import relabelled
from fusionpl.models.save import class_names

# How many classes each parent of a team knows, in order.
CLASSES: Mapping[str, Sequence[int]] = {"5 and 5 classes": (5, 5), "four parents": (3, 2, 3, 2)}
DOMAINS = "two domains"
# Photographs that the model of digits takes, too, of as many calibration images; a third of the small scale's budget.
DIGITS = ("--data.calibration", "788", "--data.validation", "100")
GREY = (
    "--data.channels", "1", "--data.batch_size", "64", "--data.train_limit", "8000", "--data.validation", "2000",
    "--data.calibration", "788", "--data.flip", "true", "--trainer.max_epochs", "8",
)  # fmt: skip


@dataclass(frozen=True)
class TaskTeam:
    """Parents of different tasks.

    Attributes:
        runs: (parents, seed) of each.
        column: of their figures.
    """

    runs: tuple[tuple[Parents, int], ...]
    column: str

    @cached_property
    def models(self) -> list[nn.Module]:
        """With their own classes."""
        return [model.to(DEVICE) for parents, seed in self.runs for model in parents.models([seed])]

    @cached_property
    def united(self) -> list[nn.Module]:
        """With the classes of all."""
        names = {str(at): class_names(model) or () for at, model in enumerate(self.models)}
        every = relabelled(self.models[0], united(names, "0"))
        return [with_classes_of(model, every) for model in self.models]

    @cached_property
    def data(self) -> JointSplits:
        own: dict[str, LabelledSplits] = {}
        for at, ((parents, seed), model) in enumerate(zip(self.runs, self.models, strict=True)):
            data = parents.data(seed)
            assert isinstance(data, LabelledSplits)
            data.follow(model)
            own[str(at)] = data
        joint = JointSplits(own, {str(at): class_names(model) for at, model in enumerate(self.models)}, "0")
        joint.follow(self.united[0])
        return joint

    @cached_property
    def tested(self) -> dict[str, list[dict[str, object]]]:
        return {name: list(data.test_dataloader()) for name, data in self.data.own.items()}

    @cached_property
    def calibration(self) -> CalibrationSet:
        return calibration_of(self.data, load_config(JOINT).calibration)

    @cached_property
    def heads(self) -> HeadFit:
        return HeadFit(self.united, self._votings, self.calibration)

    def figures(self, *models: nn.Module, outputs: Outputs = together) -> Figures:
        """The joint accuracy, and the mean of those on each parent's task when only its own classes may be answered."""
        joint, own = on_each(models, self.tested, self.data.choices, outputs)
        alone = statistics.mean(found.figures["accuracy"] for found in own.values())
        return {self.column: joint.figures["accuracy"], f"{self.column}, own": alone}

    def of(self, make: Maker) -> Figures:
        return self.figures(make())

    def side_by_side(self) -> Figures:
        return self.figures(*self.united)

    def alone(self) -> Figures:
        """What each parent has right on its own task, in the mean."""
        own = [
            on_each([model], {name: self.tested[name]}, self.data.choices)[1][name].figures["accuracy"]
            for name, model in zip(self.tested, self.united, strict=True)
        ]
        return {f"{self.column}, own": statistics.mean(own)}

    @cached_property
    def _fitted(self) -> list[nn.Module]:
        """The parents, the head of each fitted by the owners."""
        return [self.heads.fitted(index)[0] for index in range(len(self.models))]

    @cached_property
    def _best(self) -> int:
        """The best of these, by the parents' validation data."""
        batches = [list(data.val_dataloader()) for data in self.data.own.values()]
        worth = [statistics.mean(evaluate(model, own)["accuracy"] for own in batches) for model in self._fitted]
        return worth.index(max(worth))

    def best_trunk(self) -> nn.Module:
        return self._fitted[self._best]

    def all_trunks(self) -> nn.Module:
        return self.heads.side_by_side()

    def vanilla(self) -> nn.Module:
        return plain_average(self.united)

    def fused(self, config: FuseConfig) -> nn.Module:
        more = self.data.unlabelled_dataloader() if config.refine.asked else None
        sets, unlabelled = list(self.data.calibration_dataloader().sets), list(more.sets) if more else None
        return fuse(self.models, sets, config, augment=self.data.augmented, unlabelled=unlabelled).model

    def taught(self, seconds: float) -> nn.Module:
        """One stream, then taught by the owners; the seconds count from the fusion's end."""
        return self.fused(load_config(JOINT, {"refine.minutes": seconds / 60, "refine.augment": True}))

    def distilled(self, seconds: float) -> nn.Module:
        """The best trunk, taught by the owners for as long as fusion and teaching take."""
        start = time.monotonic()
        self.fused(load_config(JOINT))
        config = RefineConfig(minutes=(seconds + time.monotonic() - start) / 60, augment=True)
        return teach_parent(
            self._best, self.united, self._votings, self.calibration, config, more=self.data.unlabelled_dataloader(),
            augment=self.data.augmented,
        ).model  # fmt: skip

    @property
    def _votings(self) -> list[Voting]:
        return [Voting([1 / len(self.models)] * len(self.models))]


def cells(lab: Lab) -> Iterator[Cell]:
    """All cells of the table."""
    for repeat, team in teams(lab):
        measures: dict[str, Callable[[], Figures]] = {
            "each parent, on its own task": team.alone,
            "all parents side by side": team.side_by_side,
        }
        makers: dict[str, Maker] = {
            "best trunk, its head fitted by owner": team.best_trunk,
            "all trunks, one head fitted by owner": team.all_trunks,
            "vanilla": team.vanilla,
            "transport + refit": partial(team.fused, load_config(TRANSPORT)),
            "one stream": partial(team.fused, load_config(JOINT)),
        }
        for width in (1.5, 2):
            makers[f"one stream, {width:g} times as wide"] = partial(team.fused, load_config(JOINT, {"width": width}))
        for seconds in lab.scale.teaching[-1:]:
            makers[f"one stream, taught for {seconds} s"] = partial(team.taught, seconds)
            makers[f"best trunk, distilled for {seconds} s more than fusing takes"] = partial(team.distilled, seconds)
        measures |= {name: partial(team.of, make) for name, make in makers.items()}
        for name, measure in measures.items():
            yield Cell(name, f"{repeat}, {team.column}", measure)


def teams(lab: Lab) -> Iterator[tuple[str, TaskTeam]]:
    """Number and parents of each team."""
    for first, _ in lab.scale.pairs:
        for name, counts in CLASSES.items():
            if name in lab.scale.tasks:
                yield str(first), TaskTeam(tuple(_of_classes(lab, counts, first)), name)
        if DOMAINS in lab.scale.tasks:
            photographs = lab.parents("grey", "--data.path", lab.paths.get("cifar10", "uoft-cs/cifar10"), *GREY)
            digits = lab.parents("digits-many", *DIGITS)
            yield str(first), TaskTeam(((photographs, first), (digits, first + 1)), DOMAINS)


def _of_classes(lab: Lab, counts: Sequence[int], first: int) -> Iterator[tuple[Parents, int]]:
    start = 0
    for at, count in enumerate(counts):
        options = ["--data.classes", f"[{','.join(map(str, range(start, start + count)))}]"]
        if lab.scale.train_limit is not None:
            options += ["--data.train_limit", str(lab.scale.train_limit * count // 10)]
        yield lab.parents(f"classes-{start}-to-{start + count - 1}", *options), first + at
        start += count
