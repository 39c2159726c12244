"""Parents that are fused together, and what can be measured of them."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import nn

from benchmarks.common import DEVICE, JOINT, TRANSPORT, Figures, Maker, Parents, finetuned, plain_average
from benchmarks.paper.cells import Cell
from benchmarks.paper.choices import ALL, VARIANTS
from benchmarks.paper.scales import Subject
from fusionpl.calibration.cursor import CalibrationSet
from fusionpl.calibration.forward import eval_mode, logits
from fusionpl.calibration.kept import Kept, budget
from fusionpl.cli.jobs.alternative import trained_on
from fusionpl.evaluation.metrics import evaluate, evaluate_ensemble
from fusionpl.fusion.config import FuseConfig, RefineConfig, load_config
from fusionpl.fusion.fuse import fuse
from fusionpl.fusion.heads import HeadFit, fit_head
from fusionpl.fusion.methods.refinement import teach_parent
from fusionpl.fusion.voting import Voting
from fusionpl.training.module import shrunk

SHRINK = 0.7
ONE_SHOT, FINETUNED = "one-shot", "finetuned"


@dataclass(frozen=True)
class Team:
    """Parents that are fused together, trained and loaded when they are first needed.

    Attributes:
        subject: what they are, and how they are judged.
        runs: (parents, seed) of each.
        prepare: called before a parent is trained.
    """

    subject: Subject
    runs: tuple[tuple[Parents, int], ...]
    prepare: Callable[[], None] = lambda: None

    @cached_property
    def models(self) -> list[nn.Module]:
        self.prepare()
        return [model.to(DEVICE) for parents, seed in self.runs for model in parents.models([seed])]

    @cached_property
    def scores(self) -> list[float]:
        return [evaluate(model, self.subject.test)[self.subject.metric] for model in self.models]

    def mean(self, column: str = ONE_SHOT) -> Figures:
        return {column: statistics.mean(self.scores)}

    def ensemble(self, column: str = ONE_SHOT) -> Figures:
        return {column: evaluate_ensemble(self.models, self.subject.test)[self.subject.metric]}

    def one_shot(self, make: Maker, column: str = ONE_SHOT) -> Figures:
        return {column: evaluate(make(), self.subject.test)[self.subject.metric]}

    def divergence(self, make: Maker, column: str) -> Figures:
        """How far a model's predictions of the test samples are from the mean of the parents', in nats."""
        model, total, count = make(), 0.0, 0
        with torch.no_grad(), eval_mode(model, *self.models):
            for batch in self.subject.test:
                shown = torch.stack([logits(each, batch).float().softmax(-1) for each in self.models]).mean(0)
                predicted = logits(model, batch).float().log_softmax(-1)
                total += float((torch.special.xlogy(shown, shown) - shown * predicted).sum())
                count += shown[..., 0].numel()
        return {column: total / count}

    def finetuned(self, make: Maker, epochs: int, column: str = FINETUNED) -> Figures:
        figures = finetuned(
            make(), self.subject.data, self.subject.task_name, "default.yaml",
            seed=self.runs[0][1], epochs=epochs, trainer=self.subject.scale.trainer,
        )  # fmt: skip
        return {column: figures[self.subject.metric]}

    def both(self, make: Maker) -> Figures:
        model = make()
        return {**self.one_shot(lambda: model), **self.finetuned(lambda: model, self.subject.scale.short)}

    def both_beside(self, anchor: int, make: Maker) -> Figures:
        """Also the anchor alone, trained on with labels for as long."""
        start = time.monotonic()
        model = make()
        figures = self.finetuned(lambda: model, self.subject.scale.short)
        seconds = time.monotonic() - start
        trained, _ = trained_on(self.subject.data, seconds, self.subject.scale.trainer, self.models[anchor])
        beside = self.one_shot(lambda: trained, "anchor alone, trained on as long")
        return {**self.one_shot(lambda: model), **figures, **beside}

    def taught(self) -> Figures:
        """The second parent, taught by the first without labels, for as many steps as others are finetuned with them.

        It sees the inputs of the training data, too. (Figures measured before the end of November 2026 are of one that
        learned the labels as well.)
        """
        data = self.subject.data
        steps = self.subject.scale.short * len(data.train_dataloader())
        config = RefineConfig(steps=steps, batch_size=data.config.batch_size, augment=True)
        return self.one_shot(lambda: self._teach(1, [1.0, 0.0], config), FINETUNED)

    def _teach(self, index: int, weights: Sequence[float], config: RefineConfig) -> nn.Module:
        models = self.models[: len(weights)]
        own = self.subject.data
        more = own.unlabelled_dataloader()
        data, votings = self._calibrated(), [Voting(weights)]
        return teach_parent(index, models, votings, data, config, more=more, augment=own.augmented).model

    def _calibrated(self) -> CalibrationSet:
        calibration = load_config(JOINT).calibration
        return CalibrationSet(self.subject.calibration, calibration, Kept(budget(calibration.memory)))

    def parent(self, index: int) -> nn.Module:
        return self.models[index]

    def best(self) -> nn.Module:
        best = max(self.scores) if self.subject.task.mode == "max" else min(self.scores)
        return self.models[self.scores.index(best)]

    def head_fitted(self) -> nn.Module:
        """The best parent with its head alone fitted to what all predict."""
        found = fit_head(self.best(), self.models, [Voting(self._even)], self._calibrated())
        assert found is not None, "this family has no head to fit"
        return found[0]

    def side_by_side(self) -> nn.Module:
        """All trunks and one head, fitted likewise: what no trunk of one parent's size is expected to pass."""
        return HeadFit(self.models, [Voting(self._even)], self._calibrated()).side_by_side()

    @property
    def _even(self) -> list[float]:
        return [1 / len(self.models)] * len(self.models)

    def vanilla(self) -> nn.Module:
        return plain_average(self.models)

    def fused(self, config: FuseConfig) -> nn.Module:
        data = self.subject.data
        more = data.unlabelled_dataloader() if config.refine.asked else None
        return fuse(self.models, self.subject.calibration, config, augment=data.augmented, unlabelled=more).model

    def shrunk(self, make: Maker) -> nn.Module:
        """What training on starts from with `finetune.py --shrink`."""
        return shrunk(copy.deepcopy(make()), SHRINK)

    def refined(self) -> nn.Module:
        """One stream, then taught by the ensemble for a while, without labels."""
        return self.taught_from("fused", 60 * self.subject.scale.minutes)

    def taught_from(self, start: str, seconds: float) -> nn.Module:
        """One stream, or what `refine.start` makes of it, taught without labels; the seconds count from the fusion's
        end."""
        changes = {"refine.start": start, "refine.minutes": seconds / 60, "refine.augment": True}
        return self.fused(load_config(JOINT, changes))

    def distilled(self) -> nn.Module:
        """The best parent, taught by the ensemble on the same data for as long as fusion and refinement take."""
        start = time.monotonic()
        self.fused(load_config(JOINT))
        minutes = self.subject.scale.minutes + (time.monotonic() - start) / 60
        config = RefineConfig(minutes=minutes, augment=True)
        return self._teach(self.models.index(self.best()), self._even, config)

    def refitted_vanilla(self) -> nn.Module:
        """The plain average, refitted as if its parents were aligned: what the refit is worth alone."""
        return self.fused(load_config(TRANSPORT, {"align.solver": "identity", "calibration.samples": ALL}))

    def makers(self) -> dict[str, Maker]:
        """Vanilla and every variant."""
        return {"vanilla": self.vanilla, **{name: partial(self.fused, config) for name, config in VARIANTS.items()}}

    def references(self, repeat: str, column: str = ONE_SHOT) -> list[Cell]:
        """The rows that every other is judged by."""
        return [
            Cell("parents, mean", repeat, partial(self.mean, column), self.subject.metric),
            Cell("ensemble", repeat, partial(self.ensemble, column), self.subject.metric),
        ]
