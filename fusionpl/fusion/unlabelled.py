"""Samples without labels that a model is taught on, and those of them that say whether it helps."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from fusionpl.calibration.batches import OfEachParent, unlabelled
from fusionpl.calibration.cursor import CalibrationSet, sum_over_ranks
from fusionpl.errors import FusionError
from fusionpl.fusion.fitting import HOLD_OUT, held_out

JUDGES = 512  # held-out samples that are looked at, at most: a look then costs a few steps
Inputs = dict[str, Tensor]
Owned = tuple[int | None, Inputs]  # the parent whose data they are
Sample = tuple[int, int]  # the batch of a calibration set that it is in, and where
Streams = list[tuple[int | None, int, Iterator[Inputs]]]  # whose and how many samples, and batches of them without end


class Unlabelled:
    """This rank's share of a calibration set and of what is behind a data loader, every fifth sample held out.

    Args:
        calibration: its samples come first.
        more: a DataLoader of a data set with a length, which is read as it is needed, or one for each parent; or None.
        limit: samples of both that count, on all ranks together; None for all.
        device: where counts are added up over the ranks.

    Raises:
        FusionError: a loader that can't be read in any order; too few samples to hold one out.
    """

    def __init__(
        self,
        calibration: CalibrationSet,
        more: Iterable[Any] | OfEachParent | None,
        limit: int | None,
        device: torch.device,
    ) -> None:
        self._calibration = calibration if limit is None else calibration.head(limit)
        own = [len(next(iter(self._calibration[index].values()))) for index in self._calibration]
        count = torch.full((), float(sum(own)), device=device)
        sum_over_ranks([count])
        left = None if limit is None else max(0, limit - int(count))
        sets = dict(enumerate(more.sets)) if isinstance(more, OfEachParent) else {} if more is None else {None: more}
        left = None if left is None else left // max(1, len(sets))
        self._loaded = {owner: _Loaded(own, left) for owner, own in sets.items() if left != 0}
        most = max(int(count), *(own.count for own in self._loaded.values()), 0)
        if most < HOLD_OUT:
            raise FusionError(
                f"refinement holds out every fifth unlabelled sample, and there are {most}; give at least {HOLD_OUT}"
            )

    def taught(self, size: int, seed: int) -> Iterator[Owned | None]:
        """Batches of `size` samples, in a new order each time through, without end; None where this rank has none.

        Samples that are padded to other lengths, or are of several parents, don't meet; of all parents there are as
        many.
        """
        generator = torch.Generator().manual_seed(seed)
        streams = _drawn(self._calibration, size, generator)
        for owner, own in self._loaded.items():
            streams += own.drawn(owner, size, generator)
        if not streams:
            yield from repeat(None)
        totals: Counter[int | None] = Counter()
        for owner, count, _ in streams:
            totals[owner] += count
        shares = torch.tensor([count / totals[owner] for owner, count, _ in streams])
        while True:
            owner, _, stream = streams[int(torch.multinomial(shares, 1, generator=generator))]
            yield owner, next(stream)

    def held(self, size: int) -> Iterator[Owned]:
        """The held-out samples that are looked at, the same each time: the calibration set's, which no parent was
        trained on, before others; of each parent as many at most."""
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        owners = {*self._calibration.owners, *self._loaded} or {None}
        left = dict.fromkeys(owners, max(1, JUDGES // ranks // len(owners)))
        more = [zip(repeat(owner), own.held(size)) for owner, own in self._loaded.items()]  # without end
        for owner, batch in chain(_held(self._calibration), *more):
            if left[owner] == 0:
                continue
            batch = {key: value[: left[owner]] for key, value in batch.items()}
            left[owner] -= len(next(iter(batch.values())))
            yield owner, batch
            if not any(left.values()):
                return


def _drawn(data: CalibrationSet, size: int, generator: torch.Generator) -> Streams:
    """Batches of what is not held out, one stream for each owner and length."""
    alike: dict[tuple[Any, ...], list[Sample]] = defaultdict(list)
    for index in data:
        values = list(data[index].values())
        taught = (~held_out(data.firsts[index], len(values[0]))).nonzero()[:, 0].tolist()
        alike[data.owners[index], *(value.shape[1:] for value in values)] += [(index, row) for row in taught]

    def stream(samples: Sequence[Sample]) -> Iterator[Inputs]:
        order = _endless(samples, generator)
        while True:
            yield _gathered(data, islice(order, size))

    return [(key[0], len(samples), stream(samples)) for key, samples in alike.items() if samples]


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


def _held(data: CalibrationSet) -> Iterator[Owned]:
    for index in data:
        batch = data[index]
        rows = held_out(data.firsts[index], len(next(iter(batch.values()))))
        if rows.any():
            yield data.owners[index], {key: value[rows.to(value.device)] for key, value in batch.items()}


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

    def drawn(self, owner: int | None, size: int, generator: torch.Generator) -> Streams:
        """Batches of what is not held out."""

        def stream() -> Iterator[Inputs]:
            whole = len(self._taught) >= size
            order = torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=generator)))
            while True:
                for batch in self._batches(self._taught, size, order, shuffle=True, drop_last=whole):
                    yield unlabelled(batch)

        return [(owner, len(self._taught), stream())] if self._taught else []

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
