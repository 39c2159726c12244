"""Where models of parents with data of their own are measured: on all, over the classes of all, and on each one's."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fusionpl.calibration.cursor import CalibrationSet
from fusionpl.calibration.forward import device_of, eval_mode, logits
from fusionpl.datamodules.joint import JointSplits
from fusionpl.evaluation.bench import Bench, missing_to
from fusionpl.evaluation.bounds import bounds_of
from fusionpl.evaluation.metrics import evaluate_samples, together, with_perplexity
from fusionpl.evaluation.outcomes import Outcomes, are_tags, scored, side_by_side
from fusionpl.evaluation.rows import CEILING, HEAD_FITTED, PARENT, SIDE_BY_SIDE, judged
from fusionpl.evaluation.scores import Scores
from fusionpl.fusion.config import mixing_weights
from fusionpl.fusion.result import FusionResult
from fusionpl.fusion.voting import votings_of
from fusionpl.models.classes import missing_classes
from fusionpl.models.labels import NUMBERS

Sets = Mapping[str, Sequence[Mapping[str, Any]]]  # name of a parent -> batches of its data
Outputs = Callable[[Sequence[nn.Module], Mapping[str, Any], Tensor], Tensor]


class JointBench(Bench):
    """A bench whose figures are means over the parents' test sets, each of which counts alike, over the classes of all;
    for each parent there is the accuracy on its own when only its own classes may be answered, or the perplexity."""

    data: JointSplits

    def validated(self, model: nn.Module) -> float | None:
        """The figure by which the best model is chosen; None where a parent has no validation data."""
        if not all(self.data.sizes("validation")):
            return None
        sets = {name: list(data.val_dataloader()) for name, data in self.data.own.items()}
        return judged(self._figures(on_each([model.to(self._device)], sets, self.data.choices)[0]))

    def add_bounds(
        self, parents: Mapping[str, nn.Module], best: int, calibration: CalibrationSet, result: FusionResult
    ) -> int:
        """Adds what a fused model lies between: the best parent once its head is fitted to what each parent says on its
        own data, and all parents side by side, also with one head that is fitted alike.

        Args:
            parents: by their names, where they are run.
            best: the index of the best as it is.
            calibration: the data of each parent.
            result: of the fusion.

        Returns:
            The index of the best with its head fitted; `best` where they have no head to fit.
        """
        models = list(parents.values())
        if _disjoint([missing_classes(model) for model in models]):
            self._measure(SIDE_BY_SIDE, models, _largest)
        votings = votings_of(models, mixing_weights(result.config.weights, len(models)))
        more = not self._of_tokens
        bounds = bounds_of(models, votings, calibration, self.validated, result.binding.family, more=more)
        if bounds is None:
            return best
        row = f"{HEAD_FITTED}{PARENT}{list(parents)[bounds.best]}"
        self.add_made(row, bounds.fitted, prompted=False, validation=bounds.validation)
        if bounds.ceiling is not None:
            self.add_made(CEILING, bounds.ceiling, prompted=False)
        return bounds.best

    def _measure(self, name: str, models: Sequence[nn.Module], outputs: Outputs = together, **more: Any) -> None:
        outcomes, each = on_each(models, self._sets, self.data.choices, outputs)
        figures: dict[str, Any] = {**self._figures(outcomes), **more}
        score = Scores.perplexity if self._of_tokens else Scores.share
        tasks = {} if self.data.kind == NUMBERS else {task: score(own) for task, own in each.items()}
        if self.data.kind == NUMBERS:
            figures = {**evaluate_samples(models, self._batches)[0], **figures}
        missing = missing_to(models)
        if missing is not None:
            known = {*(~missing).nonzero()[:, 0].tolist()}
            answered = {
                task: choice is None or known & {*choice.tolist()} for task, choice in self.data.choices.items()
            }
            tasks = {task: scores for task, scores in tasks.items() if answered[task]}
        self._put(name, models, outcomes, tasks, **figures)

    @property
    def _of_tokens(self) -> bool:
        return "perplexity" in self.data.metrics

    def _figures(self, outcomes: Outcomes) -> dict[str, float]:
        figures = outcomes.figures
        return with_perplexity(figures) if self._of_tokens else figures

    @cached_property
    def _sets(self) -> Sets:
        return {name: list(data.test_dataloader()) for name, data in self.data.own.items()}

    @cached_property
    def _batches(self) -> list[Any]:
        return [batch for batches in self._sets.values() for batch in batches]


@torch.inference_mode()
def on_each(
    models: Sequence[nn.Module], sets: Sets, choices: Mapping[str, Tensor | None], outputs: Outputs = together
) -> tuple[Outcomes, dict[str, Outcomes]]:
    """What models do on the data of each parent.

    Args:
        models: one or more.
        sets: name of a parent -> its data.
        choices: name of a parent -> the classes, or tags, that it knows; None for all.
        outputs: what the models say together of a batch.

    Returns:
        What they do over the classes of all, where the samples of each set together count alike and the mean sample as
        one (tags that a parent does not know are not scored: its data don't say whether they hold); and on each set
        when only what its parent knows may be answered.
    """
    joint, tasks = [], {}
    with eval_mode(*models):
        for name, batches in sets.items():
            every, own = [], []
            for batch in batches:
                labels = batch["labels"].to(device_of(models[0]))
                output, choice = outputs(models, batch, labels), choices[name]
                own.append(scored(*_among(choice, output, labels)))
                every.append(own[-1] if choice is None or are_tags(labels) else scored(output, labels))
            joint.append(Outcomes(torch.cat(every).cpu()))
            tasks[name] = Outcomes(torch.cat(own).cpu())
    return side_by_side(joint), tasks


def _among(choice: Tensor | None, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs where only some classes may be answered, and labels."""
    if choice is None:
        return output, labels
    choice = choice.to(output.device)
    if are_tags(labels):
        return output[:, choice], labels[:, choice]
    return torch.full_like(output, -torch.inf).index_copy(1, choice, output[:, choice]), labels


def _disjoint(missing: Sequence[Tensor | None]) -> bool:
    """Whether each class is known by one model alone."""
    known = [~own.cpu() for own in missing if own is not None]
    return len(known) == len(missing) and bool((torch.stack(known).sum(0) == 1).all())


def _largest(models: Sequence[nn.Module], batch: Mapping[str, Any], labels: Tensor) -> Tensor:
    """The logits of models that know other classes, side by side: what one does not know has next to nothing of it."""
    each = [logits(model, batch).float() for model in models]
    return torch.stack([output.to(labels.device) for output in each]).amax(0)
