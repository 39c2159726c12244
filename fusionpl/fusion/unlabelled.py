"""Samples without labels that a model is taught on, and those of them that say whether it helps."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from fusionpl.calibration.batches import unlabelled
from fusionpl.calibration.cursor import CalibrationSet, sum_over_ranks
from fusionpl.errors import FusionError
from fusionpl.fusion.fitting import HOLD_OUT, held_out

JUDGES = 512  # held-out samples that are looked at, at most: a look then costs a few steps
Inputs = dict[str, Tensor]
Sample = tuple[int, int]  # the batch of a calibration set that it is in, and where
Streams = list[tuple[int, Iterator[Inputs]]]  # how many samples, and batches of them without end


class Unlabelled:
    """This rank's share of a calibration set and of what is behind a data loader, every fifth sample held out.

    Args:
        calibration: its samples come first.
        more: a DataLoader of a data set with a length, which is read as it is needed; or None.
        limit: samples of both that count, on all ranks together; None for all.
        device: where counts are added up over the ranks.

    Raises:
        FusionError: a loader that can't be read in any order; too few samples to hold one out.
    """

    def __init__(
        self, calibration: CalibrationSet, more: Iterable[Any] | None, limit: int | None, device: torch.device
    ) -> None:
        self._calibration = calibration if limit is None else calibration.head(limit)
        own = [len(next(iter(self._calibration[index].values()))) for index in self._calibration]
        count = torch.full((), float(sum(own)), device=device)
        sum_over_ranks([count])
        left = None if limit is None else max(0, limit - int(count))
        self._loaded = None if more is None or left == 0 else _Loaded(more, left)
        most = max(int(count), self._loaded.count if self._loaded else 0)
        if most < HOLD_OUT:
            raise FusionError(
                f"refinement holds out every fifth unlabelled sample, and there are {most}; give at least {HOLD_OUT}"
            )

    def taught(self, size: int, seed: int) -> Iterator[Inputs | None]:
        """Batches of `size` samples, in a new order each time through, without end; None where this rank has none.

        Samples that are padded to other lengths don't meet.
        """
        generator = torch.Generator().manual_seed(seed)
        streams = _drawn(self._calibration, size, generator)
        if self._loaded:
            streams += self._loaded.drawn(size, generator)
        if not streams:
            yield from repeat(None)
        counts = torch.tensor([float(count) for count, _ in streams])
        while True:
            yield next(streams[int(torch.multinomial(counts, 1, generator=generator))][1])

    def held(self, size: int) -> Iterator[Inputs]:
        """The held-out samples that are looked at, the same each time: the calibration set's, which no parent was
        trained on, before others."""
        left = max(1, JUDGES // (dist.get_world_size() if dist.is_initialized() else 1))
        for batch in chain(_held(self._calibration), self._loaded.held(size) if self._loaded else ()):
            batch = {key: value[:left] for key, value in batch.items()}
            left -= len(next(iter(batch.values())))
            yield batch
            if left == 0:
                return


def _drawn(data: CalibrationSet, size: int, generator: torch.Generator) -> Streams:
    """Batches of what is not held out, one stream for each length."""
    alike: dict[tuple[torch.Size, ...], list[Sample]] = defaultdict(list)
    for index in data:
        values = list(data[index].values())
        taught = (~held_out(data.firsts[index], len(values[0]))).nonzero()[:, 0].tolist()
        alike[tuple(value.shape[1:] for value in values)] += [(index, row) for row in taught]

    def stream(samples: Sequence[Sample]) -> Iterator[Inputs]:
        order = _endless(samples, generator)
        while True:
            yield _gathered(data, islice(order, size))

    return [(len(samples), stream(samples)) for samples in alike.values() if samples]


def _endless(samples: Sequence[Sample], generator: torch.Generator) -> Iterator[Sample]:
    while True:
        for at in torch.randperm(len(samples), generator=generator).tolist():
            yield samples[at]


def _gathered(data: CalibrationSet, samples: Iterable[Sample]) -> Inputs:
    rows: dict[int, list[int]] = defaultdict(list)
    for index, row in samples:
        rows[index].append(row)
    parts = [{key: value[chosen] for key, value in data[index].items()} for index, chosen in rows.items()]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _held(data: CalibrationSet) -> Iterator[Inputs]:
    for index in data:
        batch = data[index]
        rows = held_out(data.firsts[index], len(next(iter(batch.values()))))
        if rows.any():
            yield {key: value[rows.to(value.device)] for key, value in batch.items()}


class _Loaded:
    """The samples behind a data loader, which are fetched again each time."""

    def __init__(self, loader: Iterable[Any], limit: int | None) -> None:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            raise FusionError(
                "unlabelled data are drawn in any order, so they must be a torch DataLoader of a data set with a "
                f"length, not a {type(loader).__name__}; or give them as calibration data"
            )
        self._loader = loader
        self.count = len(loader.dataset) if limit is None else min(limit, len(loader.dataset))  # type: ignore[arg-type]
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        held = held_out(0, self.count)
        self._taught, self._held = (rows.nonzero()[rank::world, 0].tolist() for rows in (~held, held))

    def drawn(self, size: int, generator: torch.Generator) -> Streams:
        """Batches of what is not held out."""

        def stream() -> Iterator[Inputs]:
            whole = len(self._taught) >= size
            order = torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=generator)))
            while True:
                for batch in self._batches(self._taught, size, order, shuffle=True, drop_last=whole):
                    yield unlabelled(batch)

        return [(len(self._taught), stream())] if self._taught else []

    def held(self, size: int) -> Iterator[Inputs]:
        """What is held out, in order."""
        for batch in self._batches(self._held, size, torch.Generator()):
            yield unlabelled(batch)

    def _batches(self, rows: list[int], size: int, generator: torch.Generator, **options: Any) -> Iterable[Any]:
        # A generator of its own: see FixedSplits._loader.
        return DataLoader(
            Subset(self._loader.dataset, rows), batch_size=size, generator=generator,
            collate_fn=self._loader.collate_fn, num_workers=self._loader.num_workers, **options,
        )  # fmt: skip
