"""Puts encoders without a head to the test: their neighbours are compared with those of all parents together."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fusionpl.datamodules.base import FixedSplits
from fusionpl.datamodules.joint import JointSplits
from fusionpl.evaluation.bench import Bench
from fusionpl.evaluation.joint import JointBench
from fusionpl.evaluation.neighbours import agreement, embeddings, probe, similarities
from fusionpl.evaluation.outcomes import side_by_side
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import PARENT
from fusionpl.evaluation.scores import AGREEMENT, Scores
from fusionpl.models.labels import CLASSES

COMPARED = 2000  # samples whose neighbours are compared
PROBED = 2000  # samples that a linear probe is fitted to


class EmbeddingBench(Bench):
    """A bench where the ensemble is the mean of the encoders' similarities, and what all others are compared with; on
    the own data of a parent of a fusion they are compared with that parent."""

    def __init__(self, report: Report, data: FixedSplits, device: torch.device) -> None:
        super().__init__(report, data, device)
        self._own = isinstance(data, JointSplits)
        self._wanted: dict[str, Tensor] = {}

    def add_models(
        self, kind: str, models: Mapping[str, nn.Module], weights: Sequence[float] | None = None
    ) -> nn.Module | None:
        """Adds rows for encoders and for all of them together."""
        for name, batches in self._sets.items():
            compared = [models[name]] if self._own and kind == PARENT else list(models.values())
            self._wanted[name] = self._similarity(compared, batches)
        return super().add_models(kind, models, weights)

    def validated(self, model: nn.Module) -> float | None:
        """Nothing: there is no figure of one encoder alone."""
        return None

    def _measure(self, name: str, models: Sequence[nn.Module], **more: Any) -> None:
        each = {
            task: agreement(self._similarity(models, batches), self._wanted[task])
            for task, batches in self._sets.items()
        }
        outcomes = side_by_side(list(each.values()))
        tasks = {task: Scores.share(own, AGREEMENT) for task, own in each.items()} if self._own else {}
        probed = self._probed(models[0]) if len(models) == 1 and self._labelled else None
        self._put(name, models, outcomes, tasks, agreement=outcomes.figures["accuracy"], probe=probed, **more)

    @cached_property
    def _sets(self) -> dict[str, list[Any]]:
        sets = self.data.own if isinstance(self.data, JointSplits) else {"": self.data}
        most = max(1, COMPARED // self.data.evaluation_batch)
        return {name: list(islice(own.test_dataloader(), most)) for name, own in sets.items()}

    @cached_property
    def _batches(self) -> list[Any]:
        return next(iter(self._sets.values()))

    @property
    def _labelled(self) -> bool:
        """Whether there are classes to tell; those of several sets may be others."""
        return not self._own and self.data.kind == CLASSES and (self.data.class_names or ()) not in ((), ("",))

    def _similarity(self, models: Sequence[nn.Module], batches: Sequence[Any]) -> Tensor:
        """The mean of the encoders' similarities of all pairs of samples."""
        return torch.stack([similarities(self._embedded(model, batches)[0]) for model in models]).mean(0)

    def _probed(self, model: nn.Module) -> float:
        fitted = islice(self.data.train_dataloader(), PROBED // self.data.config.batch_size)
        return probe(self._embedded(model, fitted), self._embedded(model, self._batches))

    def _embedded(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
        assert self.data.pooling is not None
        return embeddings(model.to(self._device), batches, self.data.pooling)


def bench_for(report: Report, data: FixedSplits, device: torch.device) -> Bench:
    """The bench that fits the data; see `Bench`."""
    joint = isinstance(data, JointSplits)
    kind = EmbeddingBench if data.pooling is not None else JointBench if joint else Bench
    return kind(report, data, device)
