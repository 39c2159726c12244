"""Data of several parents side by side, also with one numbering of the classes of all."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset

from fusionpl.calibration.batches import OfEachParent
from fusionpl.calibration.embeddings import Pooling
from fusionpl.datamodules.base import IGNORED, FixedSplits, Run
from fusionpl.datamodules.labelled import LabelledSplits
from fusionpl.errors import FusionError
from fusionpl.models.labels import Kind
from fusionpl.models.preprocessing import ImageProcessing
from fusionpl.models.save import class_names

MET = 8  # batches whose samples meet
DRAWN = 0  # the seed of what is drawn to calibrate on
LISTED = 10  # names of classes that a line has room for


class InTurn:
    """Batches of several loaders, which take turns until all are through.

    Attributes:
        sampler: itself, which Lightning tells the epoch.
        batch_sampler: none, which Lightning asks for.
    """

    batch_sampler = None

    def __init__(self, loaders: Sequence[DataLoader[Any]]) -> None:
        self._loaders, self.sampler = loaders, self

    def __len__(self) -> int:
        return sum(map(len, self._loaders))

    def __iter__(self) -> Iterator[Any]:
        streams = [iter(loader) for loader in self._loaders]
        while streams:
            for stream in list(streams):
                try:
                    yield next(stream)
                except StopIteration:
                    streams.remove(stream)

    def set_epoch(self, epoch: int) -> None:
        """Hands the epoch on to those whose order depends on it."""
        for loader in self._loaders:
            if hasattr(loader.sampler, "set_epoch"):
                loader.sampler.set_epoch(epoch)


class Mixed(InTurn):
    """Batches in which samples of several loaders meet: a step on one parent's samples alone would forget the classes
    of the others. A few batches at a time, spread evenly over the epoch, are shuffled among each other.

    Args:
        loaders: of batches with the same keys.
        tokenizer: pads shorter texts; None where samples are alike in size.
    """

    def __init__(self, loaders: Sequence[DataLoader[Any]], tokenizer: Any = None) -> None:
        super().__init__(loaders)
        self._paddings = {"labels": IGNORED, "input_ids": getattr(tokenizer, "pad_token_id", None) or 0}
        self._left = getattr(tokenizer, "padding_side", "right") == "left"
        self._epoch = 0

    def __iter__(self) -> Iterator[Any]:
        streams, generator = [iter(loader) for loader in self._loaders], torch.Generator().manual_seed(self._epoch)
        order, count = self._order(), max(MET, len(streams))
        for start in range(0, len(order), count):
            given = [next(streams[number]) for number in order[start : start + count]]
            whole = {key: self._joined(key, [batch[key] for batch in given]) for key in given[0]}
            samples = torch.randperm(len(next(iter(whole.values()))), generator=generator)
            for rows in samples.tensor_split(len(given)):
                yield {key: value[rows.to(value.device)] for key, value in whole.items()}

    def _order(self) -> list[int]:
        """Which loader each batch is of."""
        places = [((at + 0.5) / len(one), number) for number, one in enumerate(self._loaders) for at in range(len(one))]
        return [number for _, number in sorted(places)]

    def _joined(self, key: str, parts: Sequence[Tensor]) -> Tensor:
        if parts[0].ndim == 2:  # of tokens
            lacking = [max(part.shape[1] for part in parts) - part.shape[1] for part in parts]
            sides = [(count, 0) if self._left else (0, count) for count in lacking]
            value = self._paddings.get(key, 0)
            parts = [functional.pad(part, side, value=value) for part, side in zip(parts, sides, strict=True)]
        return torch.cat(list(parts))

    def set_epoch(self, epoch: int) -> None:
        """Hands the epoch on, and shuffles another way."""
        super().set_epoch(epoch)
        self._epoch = epoch


class InputsOf:
    """What a parent is calibrated on: its calibration data, which it was not trained on, and then the inputs of its
    training data, in order; those that are drawn are the same each time. Of some classes of a data set the former are
    few.

    Args:
        data: the parent's.
        batch_size: samples a batch.
    """

    def __init__(self, data: FixedSplits, batch_size: int) -> None:
        self._data, self._batch_size = data, batch_size

    def __iter__(self) -> Iterator[Any]:
        if self._data.calibration_sizes()[0]:
            yield from self._data.calibration_dataloader(self._batch_size)
        yield from _drawn_alike(self._data.unlabelled_dataloader() or ())

    def __len__(self) -> int:
        more = self._data.unlabelled_dataloader()
        behind = 0 if more is None else len(more.dataset)  # type: ignore[arg-type]
        return self._data.calibration_sizes()[0] + behind


class SeveralSplits(FixedSplits):
    """Several sets of data side by side, each cut as it is by itself.

    Args:
        own: name -> data.
    """

    def __init__(self, own: Mapping[str, FixedSplits]) -> None:
        super().__init__()
        self.own = own

    def describe(self) -> str:
        """How much there is in each, in words."""
        return ", ".join(f"{name} {data.describe()}" for name, data in self.own.items())

    def dataset(self, part: str) -> ConcatDataset[Any]:
        """The data of `part` of all, one after the other: their number; what they are is in `own`."""
        return ConcatDataset([data.dataset(part) for data in self.own.values()])

    def alone(self) -> None:
        """Serves every sample again after a training whose processes shared them."""
        self.trainer = None
        for data in self.own.values():
            data.trainer = None

    def loaders(self, name: str) -> dict[str, DataLoader[Any]]:
        """What a method of each gives, such as `val_dataloader`, by the names of the data."""
        for data in self.own.values():
            data.trainer = self.trainer  # which says how many ranks share them
        return {key: getattr(data, name)() for key, data in self.own.items()}


class OwnSplits(SeveralSplits):
    """The data of each parent, cut as they were for it.

    Args:
        own: name of a parent -> its data.
        known: name of a parent -> its classes, in its order; None where they have no names.
        leading: of whose data the options of preparation count.

    Raises:
        FusionError: data of classes that their parent does not know.
    """

    def __init__(
        self, own: Mapping[str, FixedSplits], known: Mapping[str, tuple[str, ...] | None], leading: str
    ) -> None:
        super().__init__(own)
        self._known, self._leading = known, own[leading]
        self.config, self.tokenizer = self._leading.config, self._leading.tokenizer
        self.reads, self.evaluation_batch = self._leading.reads, self._leading.evaluation_batch
        for name, data in own.items():
            _check_classes(name, data, known)

    @property
    def processing(self) -> ImageProcessing | None:
        """How images are prepared, all alike; None where the data are none."""
        return self._leading.processing

    def texts(self) -> Iterable[str]:
        """Text of all to calibrate on."""
        return chain.from_iterable(data.texts() for data in self.own.values())

    def augmented(self, batch: Any) -> Any:
        """A batch as training sees it, changed at random."""
        return self._leading.augmented(batch)

    def check_reads(self, model: nn.Module) -> None:
        """Raises FusionError unless `model` reads what the data of all give."""
        for data in self.own.values():
            data.check_reads(model)

    def sizes(self, part: str) -> list[int]:
        """How many samples of `part` each parent has."""
        return [len(data.dataset(part)) for data in self.own.values()]  # type: ignore[arg-type]  # all have one

    def calibration_dataloader(self, batch_size: int = 64) -> OfEachParent:  # type: ignore[override]
        """What each parent is calibrated on; `calibration.samples` of each are taken."""
        return OfEachParent(tuple(InputsOf(data, batch_size) for data in self.own.values()))

    def calibration_batch(self, batch_size: int) -> Any:
        """The first batch of the first parent's."""
        return next(iter(InputsOf(next(iter(self.own.values())), batch_size)))

    def calibration_sizes(self) -> list[int]:
        """How many calibration samples each parent has."""
        return [len(InputsOf(data, 1)) for data in self.own.values()]

    def unlabelled_dataloader(self) -> OfEachParent | None:  # type: ignore[override]
        """The training data of each parent, for what is learned without their labels; None unless each has some."""
        loaders = [data.unlabelled_dataloader() for data in self.own.values()]
        each = tuple(loader for loader in loaders if loader is not None)
        return OfEachParent(each) if len(each) == len(loaders) else None


class JointSplits(OwnSplits):
    """The data of each parent with one numbering of the classes of all, or with tokens, or for encoders without a head;
    parts of all take turns."""

    @property
    def metrics(self) -> Sequence[str]:  # type: ignore[override]
        """What is measured besides the loss."""
        return self._leading.metrics

    @property
    def num_classes(self) -> int:
        """Number of classes of all parents, or of tokens; 1 for a regression."""
        return self._leading.num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes of all parents, in the order of the labels; None where labels are no classes."""
        return self._leading.class_names

    @property
    def kind(self) -> Kind:
        """What the labels are."""
        return self._leading.kind

    @property
    def prompt(self) -> Tensor | None:
        """Tokens that a model can go on with, see `FixedSplits`."""
        return self._leading.prompt

    @property
    def pooling(self) -> Pooling | None:
        """How tokens become one embedding, see `FixedSplits`."""
        return self._leading.pooling

    @property
    def choices(self) -> dict[str, Tensor | None]:
        """Name of a parent -> the classes that it knows, int64; None where it knows all."""
        numbers = {name: number for number, name in enumerate(self.class_names or ())}
        own = {
            name: None if known is None else [numbers[one] for one in known if one in numbers]
            for name, known in self._known.items()
        }
        return {
            name: None if places is None or len(places) == len(numbers) else torch.tensor(places)
            for name, places in own.items()
        }

    def follow(self, model: nn.Module, processing: ImageProcessing | None = None) -> None:
        """Takes what the options leave open, and the numbers of classes, from a model that knows those of all.

        Raises:
            FusionError: it has none for a class of the data.
        """
        every = class_names(model)
        for name, data in self.own.items():
            data.follow(model, processing)
            lost = [one for one in data.class_names or () if every is not None and one not in every]
            if lost:
                raise FusionError(
                    f"the data of {name} ('{data.config.path}') have the class '{lost[0]}', and the fused model has "
                    "none of that name; use labels union"
                )

    def check_model(self, model: nn.Module, run: Run | None = None) -> None:
        """Raises FusionError unless `model` reads the data of all and has an output for each class."""
        for data in self.own.values():
            data.check_model(model, run)

    def train_dataloader(self) -> InTurn:  # type: ignore[override]
        """The training data of all, mixed; of streams, which have no length, batches take turns."""
        loaders = list(self.loaders("train_dataloader").values())
        if any(isinstance(loader.dataset, IterableDataset) for loader in loaders):
            return InTurn(loaders)
        return Mixed(loaders, self.tokenizer)

    def val_dataloader(self) -> InTurn:  # type: ignore[override]
        """The validation data of all, batches of which take turns."""
        return InTurn(list(self.loaders("val_dataloader").values()))

    def test_dataloader(self) -> InTurn:  # type: ignore[override]
        """The test data of all, batches of which take turns."""
        return InTurn(list(self.loaders("test_dataloader").values()))


def _drawn_alike(batches: Iterable[Any]) -> Iterator[Any]:
    """Batches for which torch's global RNG begins at the same place, and is left alone."""
    stream, state = iter(batches), torch.Generator().manual_seed(DRAWN).get_state()
    while True:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            batch = next(stream, None)
            state = torch.get_rng_state()
        if batch is None:
            return
        yield batch


def _check_classes(name: str, data: FixedSplits, known: Mapping[str, tuple[str, ...] | None]) -> None:
    """Gives data the names of their parent's classes; raises FusionError where it does not know one of theirs."""
    own = known[name]
    if own is None or not isinstance(data, LabelledSplits) or data.class_names is None:
        return
    data.called(own)
    served = set(data.class_names)
    unknown = [one for one in data.class_names if one not in own]
    if not unknown:
        return
    others = [other for other, names in known.items() if served <= set(names or ())]
    if others:
        step = f"{others[0]} does: give the paths of --data.path in the order of --parents"
    elif not served & {one for names in known.values() for one in names or ()}:
        step = "no parent knows any of their classes: name its own data with --data.path, one path a parent"
    else:
        step = f"it knows {', '.join(own[:LISTED])}{', ...' * (len(own) > LISTED)}: leave other samples out of its data"
    raise FusionError(
        f"the data of {name} ('{data.config.path}') have the class '{unknown[0]}', which {name} does not know; {step}"
    )
