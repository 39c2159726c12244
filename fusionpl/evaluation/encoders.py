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
from fusionpl.evaluation.report import Report
from fusionpl.models.labels import CLASSES

COMPARED = 2000  # samples whose neighbours are compared
PROBED = 2000  # samples that a linear probe is fitted to


class EmbeddingBench(Bench):
    """A bench where the ensemble is the mean of the encoders' similarities, and what all others are compared with."""

    _wanted: Tensor | None = None

    def add(self, name: str, models: Sequence[nn.Module], *, prompted: bool = False, **more: Any) -> None:
        """Adds a row for an encoder, or for the mean of the similarities of several; none goes on with a prompt."""
        each = [self._embedded(model, self._batches) for model in models]
        similarity = torch.stack([similarities(embedded) for embedded, _ in each]).mean(0)
        assert self._wanted is not None  # the models come first
        outcomes = agreement(similarity, self._wanted)
        probed = probe(self._fitted(models[0]), each[0]) if len(models) == 1 and self._labelled else None
        self._put(name, models, outcomes, agreement=outcomes.figures["accuracy"], probe=probed, **more)

    def add_models(
        self, kind: str, models: Mapping[str, nn.Module], weights: Sequence[float] | None = None
    ) -> nn.Module | None:
        """Adds rows for encoders and for all of them together."""
        together = [similarities(self._embedded(model, self._batches)[0]) for model in models.values()]
        self._wanted = torch.stack(together).mean(0)
        return super().add_models(kind, models, weights)

    def validated(self, model: nn.Module) -> float | None:
        """Nothing: there is no figure of one encoder alone."""
        return None

    @cached_property
    def _batches(self) -> list[Any]:
        return list(islice(self.data.test_dataloader(), max(1, COMPARED // self.data.evaluation_batch)))

    @property
    def _labelled(self) -> bool:
        return self.data.kind == CLASSES and (self.data.class_names or ()) not in ((), ("",))

    def _embedded(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
        assert self.data.pooling is not None
        return embeddings(model.to(self._device), batches, self.data.pooling)

    def _fitted(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        return self._embedded(model, islice(self.data.train_dataloader(), PROBED // self.data.config.batch_size))


def bench_for(report: Report, data: FixedSplits, device: torch.device) -> Bench:
    """The bench that fits the data; see `Bench`."""
    if isinstance(data, JointSplits):
        return JointBench(report, data, device)
    kind = Bench if data.pooling is None else EmbeddingBench
    return kind(report, data, device)
