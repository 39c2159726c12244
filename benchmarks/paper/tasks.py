"""Parents that know different things: teams in which each has its own data and labels."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.common import DEVICE, JOINT, TRANSPORT, Figures, Maker, Parents, plain_average
from benchmarks.paper.cells import Cell
from benchmarks.paper.scales import Lab
from fusionpl.calibration.cursor import CalibrationSet
from fusionpl.cli import finetune
from fusionpl.cli import fuse as fuse_command
from fusionpl.datamodules.base import calibration_of
from fusionpl.datamodules.joint import JointSplits
from fusionpl.datamodules.labelled import LabelledSplits
from fusionpl.evaluation.joint import Outputs, on_each
from fusionpl.evaluation.metrics import evaluate, together
from fusionpl.evaluation.rows import CEILINGS, HEAD_FITTED, PARENT
from fusionpl.fusion.config import FuseConfig, RefineConfig, load_config
from fusionpl.fusion.fuse import fuse
from fusionpl.fusion.heads import HeadFit
from fusionpl.fusion.methods.refinement import teach_parent
from fusionpl.fusion.voting import Voting
from fusionpl.models.classes import united, with_classes_of
from fusionpl.models.resized import relabelled
from fusionpl.models.save import class_names
from fusionpl.presets import CONF

# How many classes each parent of a team knows, in order.
CLASSES: Mapping[str, Sequence[int]] = {"5 and 5 classes": (5, 5), "four parents": (3, 2, 3, 2)}
DOMAINS = "two domains"
SENTENCES = "films and questions"  # told by heads of their own
COLUMNS = {"sst2": "SST-2", "trec": "TREC"}
# Photographs that the model of digits takes, too, of as many calibration images; a third of the small scale's budget.
DIGITS = ("--data.calibration", "788", "--data.validation", "100")
GREY = (
    "--data.channels", "1", "--data.batch_size", "64", "--data.train_limit", "8000", "--data.validation", "2000",
    "--data.calibration", "788", "--data.flip", "true", "--trainer.max_epochs", "8",
)  # fmt: skip

ALONE, BEST_TRUNK = "each parent, on its own task", "best trunk, its head fitted by owner"
ALL_TRUNKS, ONE_STREAM, WIDER = "all trunks, one head fitted by owner", "one stream", "one stream, {:g} times as wide"
CSV = ("--logger", "csv")


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


@dataclass(frozen=True)
class SentencesTeam:
    """Language models that were finetuned for different tasks, fused by command, each with a head of its own.

    Attributes:
        parents: not yet finetuned.
        seeds: of these, one a task of SENTENCES.
        options: of finetune.py, for each task.
    """

    parents: Parents
    seeds: Sequence[int]
    options: Mapping[str, Sequence[str]]

    @cached_property
    def runs(self) -> dict[str, Path]:
        """Task -> the run of its parent, which is finetuned if it is not there."""
        runs = {}
        for seed, (task, options) in zip(self.seeds, self.options.items(), strict=True):
            runs[task] = self.parents.runs.with_name(f"{self.parents.runs.name}-{task}") / f"seed-{seed}"
            if not (runs[task] / "model").is_dir():
                words = ["--model", str(self.parents.folder(seed)), "--config", str(CONF / "finetune" / f"{task}.yaml")]
                finetune.run([*words, "--seed", str(seed), "--output", str(runs[task]), "--overwrite", *CSV, *options])
        return runs

    @cached_property
    def rows(self) -> Mapping[str, Mapping[str, float]]:
        """Row -> task -> figure, of the reports of a fusion that is compared with a wider one, and of a third."""
        reports = [self._report("--compare", "wide"), self._report("--width", "2")]
        names = {f"{PARENT}{run.name}": ALONE for task, run in self.runs.items()}
        names |= {"fused": ONE_STREAM, "fused (wide)": WIDER.format(1.5), CEILINGS: ALL_TRUNKS}
        rows: dict[str, dict[str, float]] = {}
        for row in reports[0]:
            name = BEST_TRUNK if row["name"].startswith(HEAD_FITTED) else names.get(row["name"], row["name"])
            rows.setdefault(name, {}).update(row["tasks"])
        rows[WIDER.format(2)] = next(row["tasks"] for row in reports[1] if row["name"] == "fused")
        return rows

    def figures(self, row: str) -> Figures:
        return {COLUMNS[task]: self.rows[row][run.name] for task, run in self.runs.items()}

    def _report(self, *options: str) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            parents, output = map(str, self.runs.values()), Path(folder) / "fused"
            fuse_command.run(["--parents", *parents, "--labels", "separate", "--output", str(output), *CSV, *options])
            rows: list[dict[str, Any]] = json.loads((output / "report" / "report.json").read_text())["rows"]
        return rows


def cells(lab: Lab) -> Iterator[Cell]:
    """All cells of the table."""
    for repeat, team in teams(lab):
        measures: dict[str, Callable[[], Figures]] = {
            ALONE: team.alone,
            "all parents side by side": team.side_by_side,
        }
        makers: dict[str, Maker] = {
            BEST_TRUNK: team.best_trunk,
            ALL_TRUNKS: team.all_trunks,
            "vanilla": team.vanilla,
            "transport + refit": partial(team.fused, load_config(TRANSPORT)),
            ONE_STREAM: partial(team.fused, load_config(JOINT)),
        }
        for width in (1.5, 2):
            makers[WIDER.format(width)] = partial(team.fused, load_config(JOINT, {"width": width}))
        for seconds in lab.scale.teaching[-1:]:
            makers[f"one stream, taught for {seconds} s"] = partial(team.taught, seconds)
            makers[f"best trunk, distilled for {seconds} s more than fusing takes"] = partial(team.distilled, seconds)
        measures |= {name: partial(team.of, make) for name, make in makers.items()}
        for name, measure in measures.items():
            yield Cell(name, f"{repeat}, {team.column}", measure)
    for repeat, sentences in of_sentences(lab):
        for name in (ALONE, BEST_TRUNK, ALL_TRUNKS, ONE_STREAM, WIDER.format(1.5), WIDER.format(2)):
            yield Cell(name, f"{repeat}, {SENTENCES}", partial(sentences.figures, name))


def of_sentences(lab: Lab) -> Iterator[tuple[str, SentencesTeam]]:
    """Number and parents of each team of language models, where there is data of both tasks."""
    if SENTENCES in lab.scale.tasks and COLUMNS.keys() <= lab.paths.keys():
        limit = [] if lab.scale.sentences is None else ["--data.train_limit", str(lab.scale.sentences)]
        options = {task: ["--data.path", lab.paths[task], *limit] for task in COLUMNS}
        for pair in lab.scale.pairs:
            yield str(pair[0]), SentencesTeam(lab.language(), pair, options)


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
