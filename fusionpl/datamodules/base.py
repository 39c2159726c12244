"""What all data modules share: splits that no seed changes, and an order that (seed, epoch) decides."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from fusionpl.calibration.config import CalibrationConfig
from fusionpl.calibration.cursor import CalibrationSet
from fusionpl.calibration.embeddings import Pooling
from fusionpl.calibration.forward import eval_mode, logits
from fusionpl.calibration.kept import Kept, budget
from fusionpl.errors import FusionError, reason
from fusionpl.models.labels import CLASSES, IN_WORDS, NUMBERS, TAGS, Kind, kind_of
from fusionpl.models.preprocessing import ImageProcessing

EVALUATION_BATCH = 256
IGNORED = -100  # the label of a token that is not scored, as in transformers and cross_entropy
# What data must hold for a model's outputs.
LABELS_OF = {
    CLASSES: "give data with one class a sample, by name or number",
    TAGS: "give data with a list of labels a sample, or several columns of 0 and 1 (--data.label_column a,b,c)",
    NUMBERS: "give data with a floating-point number a sample",
}
PIXELS = "pixel_values"  # what models of images read
Collate = Callable[[Any], Any]
Run = Callable[[dict[str, Any]], Tensor]


class ShareSampler(DistributedSampler[Any]):
    """This rank's share in order. DistributedSampler repeats samples to make shares equal, which falsifies metrics."""

    def __iter__(self) -> Iterator[Any]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


def as_it_is(batch: Any) -> Any:
    """The collate function of data sets that make batches themselves (`__getitems__`)."""
    return batch


class FixedSplits(L.LightningDataModule):
    """Train, validation, calibration and test data; no seed changes what is in which split.

    Args:
        seed: decides, with the epoch, the order of the training data. What augments or masks it draws from torch's
            global RNG, which `SeedEpochs` seeds.
    """

    config: Any
    evaluation_batch = EVALUATION_BATCH
    metrics: Sequence[str] = ("accuracy",)
    tokenizer: Any = None
    reads = PIXELS

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    @abstractmethod
    def dataset(self, part: str) -> Dataset[Any]:
        """The data of `part`: train, validation, calibration or test."""

    def collate(self, part: str) -> Collate:
        """Makes a batch of the items of `part`."""
        return as_it_is

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of classes or tokens to choose from; 1 for regression."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, in the order of the labels; None where labels are no classes."""
        return None

    @property
    def kind(self) -> Kind:
        """What the labels are: one class, or token, each; tags; or numbers."""
        return CLASSES

    @property
    def prompt(self) -> Tensor | None:
        """Tokens that a model can go on with, int64 [T]; None where the task is another."""
        return None

    @property
    def pooling(self) -> Pooling | None:
        """How the tokens of an encoder without a head become one embedding; None where models have outputs to judge."""
        return None

    @property
    def processing(self) -> ImageProcessing | None:
        """How images are prepared; None where the data are none."""
        return None

    def describe(self) -> str:
        """How much there is to train on, in words."""
        return f"{len(self.dataset('train')):,} samples"  # type: ignore[arg-type]

    def baseline(self) -> dict[str, float]:
        """Figures of a trivial predictor on the test part, for comparison."""
        return {}

    def texts(self) -> Iterable[str]:
        """Text to calibrate on as it stands in the data, before a tokenizer sees it; here none."""
        return ()

    def derived(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Further figures that follow from those of a model on the test part, `loss` among them."""
        return {}

    def augmented(self, batch: Any) -> Any:
        """A batch as training sees it, changed at random; here as it is."""
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augments training batches, as one batch and on their device."""
        return self.augmented(batch) if self.trainer is not None and self.trainer.training else batch

    def follow(self, model: nn.Module, processing: ImageProcessing | None = None) -> None:
        """Takes from `model`, which reads the data, what the options leave open; here nothing.

        Args:
            model: which.
            processing: how it takes its images, see `fusionpl.models.processors.image_processing`.
        """

    def check_reads(self, model: nn.Module) -> None:
        """Raises FusionError unless `model` reads what the data give."""
        reads = getattr(model, "main_input_name", PIXELS)
        if reads != self.reads:
            raise FusionError(
                f"a {type(model).__name__} reads {reads}, but '{self.config.path}' gives {self.reads}; "
                "choose other data with --task"
            )

    def check_model(self, model: nn.Module, run: Run | None = None) -> None:
        """Checks that `model` reads the data and has an output for each class.

        Args:
            model: of either library.
            run: gives its logits for a batch; by default it is run.

        Raises:
            FusionError: naming the model and what does not fit.
        """
        self.check_reads(model)
        name, path = type(model).__name__, self.config.path
        gives = kind_of(model)
        if gives != self.kind:
            raise FusionError(
                f"the {name} gives {IN_WORDS[gives]} (problem_type {gives}), but the labels of '{path}' are "
                f"{IN_WORDS[self.kind]}; {LABELS_OF[gives]}"
            )
        batch = self.sample()
        try:
            with torch.no_grad(), eval_mode(model):
                outputs = run(batch) if run else logits(model, batch)
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:  # each library has its own
            raise FusionError(f"the {name} can't read the data of '{path}': {reason(error)}") from error
        wanted = batch["labels"].ndim + (self.kind != TAGS)
        if outputs.ndim != wanted or not self.fits(outputs.shape[-1]):
            raise FusionError(
                f"the {name} puts out {' x '.join(map(str, outputs.shape[1:]))} numbers a sample, which does not fit "
                f"the {self.num_classes} classes of '{path}'; choose its own data with --task and --data"
            )

    def fits(self, outputs: int) -> bool:
        """Whether a model with so many outputs can be measured on these data."""
        return outputs == self.num_classes

    def sample(self) -> Any:
        """A batch of one: of the test part, or of the calibration part where nothing is there to test on."""
        part = "test" if len(self.dataset("test")) else "calibration"  # type: ignore[arg-type]  # all have a length
        return next(iter(self.calibration_dataloader(1) if part == "calibration" else self._loader(part, 1, None, 0)))

    def model_args(self) -> dict[str, Any]:
        """What the data decide about a model that is built for them: arguments of its config."""
        return {}

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in an order that (seed, epoch) decides: Lightning sets the sampler's epoch."""
        data = self.dataset("train")
        sampler: DistributedSampler[Any] = DistributedSampler(data, *self._ranks, shuffle=True, seed=self.seed)
        return self._loader("train", self.config.batch_size, sampler, self.config.num_workers)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation data in order, shared out among the ranks."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        """The test data in order, shared out among the ranks."""
        return self._evaluation_loader("test")

    def calibration_dataloader(self, batch_size: int = 64) -> DataLoader[Any]:
        """The calibration data, never trained, validated or tested on, in a fixed order; the same on every rank.

        Raises:
            FusionError: there are none.
        """
        if not len(self.dataset("calibration")):  # type: ignore[arg-type]  # all have a length
            raise FusionError(
                "there are no calibration data; give some samples of the training data: --data.calibration 200"
            )
        return self._loader("calibration", batch_size, None, 0)

    def sizes(self, part: str) -> list[int]:
        """How many samples of `part` there are in each set of data; here there is one."""
        return [len(self.dataset(part))]  # type: ignore[arg-type]  # all have a length

    def calibration_batch(self, batch_size: int) -> Any:
        """The first batch of the calibration data."""
        return next(iter(self.calibration_dataloader(batch_size)))

    def calibration_sizes(self) -> list[int]:
        """How many calibration samples there are in each set of data; here there is one."""
        return self.sizes("calibration")

    def unlabelled_dataloader(self) -> DataLoader[Any] | None:
        """The training data as they are, for what is learned without their labels; None where they have no length."""
        return self._loader("train", self.config.batch_size, None, self.config.num_workers)

    @property
    def _ranks(self) -> tuple[int, int]:
        """Number of processes, and the number of this one."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)

    def _evaluation_loader(self, part: str) -> DataLoader[Any]:
        data, (world, rank) = self.dataset(part), self._ranks
        share, more = divmod(len(data), world)  # type: ignore[arg-type]
        if more and not share:
            raise FusionError(f"the {part} data are {more} samples, too few for {world} processes; use fewer devices")
        size = self.evaluation_batch
        while more and share % size == 0:  # whoever has a sample more would run a batch alone; FSDP waits for all
            size += 1
        return self._loader(part, size, ShareSampler(data, world, rank, shuffle=False), 0)

    def _loader(self, part: str, size: int, sampler: Any, workers: int) -> DataLoader[Any]:
        data = self.dataset(part)
        on_cpu = getattr(data, "device", torch.device("cpu")).type == "cpu"
        return DataLoader(
            data,
            batch_size=size,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=on_cpu and torch.cuda.is_available(),  # only the CPU's memory can be pinned
            collate_fn=self.collate(part),
            # a generator of its own: making an iterator would draw from the global RNG, and a resumed run
            # makes other iterators than an uninterrupted one
            generator=torch.Generator().manual_seed(self.seed),
        )


def calibration_of(data: FixedSplits, config: CalibrationConfig) -> CalibrationSet:
    """The calibration data of a data module, in this process alone.

    Args:
        data: one set for all parents, or those of each.
        config: samples, batch size and memory.
    """
    return CalibrationSet(
        data.calibration_dataloader(config.batch_size), config, Kept(budget(config.memory)), whole=True
    )
