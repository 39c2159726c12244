"""What a scale fixes: the data, the model, how long its parents and the fused models are trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from benchmarks import text
from benchmarks.common import PAIRS, Parents
from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.datamodules.base import FixedSplits
from fusionpl.evaluation.cost import flops
from fusionpl.families.binding import bind
from fusionpl.fusion.config import FuseConfig, RefitConfig
from fusionpl.fusion.target import target_of
from fusionpl.training.tasks import TASKS, Task, TaskName

SEEDS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Scale:
    """One size of every table.

    Attributes:
        preset: file of conf/train for the image models.
        options: further options of train.py for them.
        narrow: what a narrow parent adds to `options`.
        depths: group of parents -> what a deep and a shallow parent add.
        text_depths: the same of a family of language models.
        finetuning: epochs of the finetuning curve.
        short: epochs of finetuning in the other tables: at most a tenth of a parent's, if that is one or more.
        pairs: of seeds.
        many: numbers of parents.
        minutes: that label-free refinement takes.
        teaching: seconds that models are taught for without labels.
        teams: numbers of parents of disjoint data.
        widths: of one stream, in multiples of a parent's.
        samples: calibration samples of the ablation.
        accelerated: trained on a GPU, in bf16.
        corpus, text: the language models' corpus and further options of train.py for them.
        text_family: of the language models in teams.
        text_teams, text_widths: as `teams` and `widths`; heads come in groups, so 1.25 times as wide there is not.
        families: of language models that are compared.
        sentences: finetune on at most this many of SST-2 and TREC; None for all.
        tasks: what parents of different tasks know.
        train_limit: training images of all classes together; None for all.
    """

    preset: str
    options: tuple[str, ...]
    narrow: tuple[str, ...]
    depths: Mapping[str, tuple[str, ...]]
    finetuning: tuple[int, ...]
    short: int
    pairs: Sequence[tuple[int, int]] = PAIRS
    many: tuple[int, ...] = (2, 3, 4, 5)
    minutes: float = 2.0
    teaching: tuple[int, ...] = (30, 60)
    teams: tuple[int, ...] = (2, 4, 6)
    widths: tuple[float, ...] = (1, 1.25, 1.5, 2)
    samples: tuple[int, ...] = (25, 50, 100, 200, 500, 1000, 2000)
    accelerated: bool = False
    corpus: str = "wikitext2"
    text: tuple[str, ...] = ()
    text_family: str = "llama"
    text_teams: tuple[int, ...] = (2, 4)
    text_widths: tuple[float, ...] = (1, 1.5, 2)
    families: tuple[str, ...] = ("gpt2", "llama")
    text_depths: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    sentences: int | None = None
    tasks: tuple[str, ...] = ("5 and 5 classes",)
    train_limit: int | None = None

    @property
    def trainer(self) -> dict[str, Any]:
        """Arguments of Lightning's Trainer for finetuning on this scale's device."""
        return {"precision": "bf16-mixed"} if self.accelerated else {}


SCALES = {
    "digits": Scale(
        preset="vit-digits.yaml",
        options=(),
        narrow=("--model.args.embed_dim", "64"),
        depths={"wide": (), "shallow": ("--model.args.depth", "4")},
        text_depths={"gpt2": {"gpt2": (), "gpt2-shallow": ("--model.args.n_layer", "3")}},
        finetuning=(1, 2, 5, 10),
        short=3,
        minutes=0.5,
        samples=(25, 50, 100),
        corpus="pydoc",
        families=("bert", "gpt2", "llama", "t5"),
        sentences=2000,
        tasks=("5 and 5 classes", "four parents", "two domains", "films and questions"),
    ),
    # A small ViT on a sixth of CIFAR-10: a table takes up to an hour on 2 cores, the finetuning curve four.
    "small": Scale(
        preset="vit-cifar10-small.yaml",
        options=("--data.train_limit", "8000", "--trainer.max_epochs", "12", "--data.calibration", "2000"),
        narrow=("--model.args.embed_dim", "64"),
        depths={"deep": ("--model.args.depth", "6"), "wide": ()},
        finetuning=(1, 2, 5, 10, 20),
        short=1,
        sentences=2000,
        train_limit=8000,
    ),
    # All of CIFAR-10, 75 minutes a parent on a core that multiplies bf16, in several sittings; one pair of each table.
    # Attention written out is faster there: TIMM_FUSED_ATTN=0 in the environment.
    "medium": Scale(
        preset="vit-cifar10-small.yaml",
        options=(
            "--model.args.embed_dim", "192", "--model.args.depth", "6", "--model.args.num_heads", "6",
            "--trainer.max_epochs", "24", "--trainer.precision", "bf16-mixed",
            "--data.train_limit", "null", "--data.batch_size", "128",
        ),
        narrow=("--model.args.embed_dim", "96", "--model.args.num_heads", "3"),
        depths={"wide": (), "shallow": ("--model.args.depth", "4")},
        finetuning=(1, 2, 5),
        short=2,
        pairs=((1, 2),),
        teams=(2,),
        sentences=2000,
    ),
    # The paper's model on all of CIFAR-10, for one GPU: the images live on it. Four parents at once, two of all data
    # and two of halves, take 5 minutes of an H200, their fusions as long; one pair of each table.
    "paper": Scale(
        preset="vit-cifar10.yaml",
        options=(
            "--data.on_device", "true", "--data.num_workers", "0", "--data.batch_size", "512", "--compile", "true",
            "--trainer.precision", "bf16-mixed", "--trainer.max_epochs", "50", "--optim.lr", "1e-3",
        ),
        narrow=("--model.args.embed_dim", "192"),
        depths={"wide": (), "shallow": ("--model.args.depth", "4")},
        finetuning=(1, 2, 5, 10),
        short=5,
        pairs=((1, 2),),
        teams=(2,),
        minutes=0.5,
        accelerated=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What is fused, and how it is judged.

    Attributes:
        scale: of the table.
        parents: of all data, one a seed.
        task_name: what they do.
        shards: begins the names of folders of parents of disjoint data.
        of_data: (folder, data set) -> parents of other data, which can be fused with these.
    """

    scale: Scale
    parents: Parents
    task_name: TaskName
    shards: str
    of_data: Callable[[str, Path], Parents]

    @property
    def task(self) -> Task:
        return TASKS[self.task_name]

    @property
    def metric(self) -> Literal["accuracy", "loss"]:
        """The test figure that models are compared by."""
        return "accuracy" if self.task.mode == "max" else "loss"

    @cached_property
    def data(self) -> FixedSplits:
        """What every fused model is calibrated, finetuned and tested on."""
        return self.parents.data(SEEDS[0])

    @cached_property
    def test(self) -> list[Any]:
        """The test batches."""
        return list(self.data.test_dataloader())

    @cached_property
    def calibration(self) -> list[Any]:
        """The calibration batches."""
        return list(self.data.calibration_dataloader())

    def flops(self, width: float) -> float:
        """What a model of another width costs to run, in multiples of one."""
        model = self.parents.models(SEEDS[:1])[0]
        network = SectionedModel(model, bind(model))
        wide = target_of(network, FuseConfig(strategy="joint", refit=RefitConfig("ridge"), width=width))
        empty = wide.module.to_empty(device="cpu")
        for buffer in empty.buffers():  # some are indices
            buffer.zero_()
        batch = self.test[0]
        return flops(empty, batch) / flops(model, batch)


@dataclass(frozen=True)
class Lab:
    """The parents of a scale and where things are kept.

    Attributes:
        scale: what is trained.
        runs: parents, checkpoints and measured cells.
        paths: data set -> a local folder; the hub's otherwise. Names: images, corpus, sst2, trec.
    """

    scale: Scale
    runs: Path
    paths: dict[str, str] = field(default_factory=dict)

    @cached_property
    def images(self) -> Subject:
        """The image models."""

        def of_data(folder: str, path: Path) -> Parents:
            return self.parents(folder, "--data.path", str(path), "--data.calibration", "0")

        return Subject(self.scale, self.parents(), "image-classification", "shards", of_data)

    @cached_property
    def text(self) -> Subject:
        """The language models; those of other data take the tokenizer of these."""
        family = self.scale.text_family
        parents = self.language(family)

        def of_data(folder: str, path: Path) -> Parents:
            tokenizer = parents.runs / f"seed-{SEEDS[0]}"
            return self.language(family, folder, "--data.path", str(path), "--data.tokenizer", str(tokenizer))

        return Subject(self.scale, parents, text.TASKS[family], f"{family}-shards", of_data)

    def parents(self, group: str = "wide", *options: str) -> Parents:
        """Parents of the image model; those of a group share a folder and options beyond the scale's."""
        words = [*self.scale.options, *options]
        if "images" in self.paths and "--data.path" not in options:
            words += ["--data.path", self.paths["images"]]
        return Parents(self.scale.preset, self.runs / group, tuple(words))

    @property
    def narrow(self) -> Parents:
        """Parents of a smaller width."""
        return self.parents("narrow", *self.scale.narrow)

    @property
    def depths(self) -> list[Parents]:
        """Deep parents and shallow ones."""
        return [self.parents(group, *options) for group, options in self.scale.depths.items()]

    def language(self, family: str = "bert", folder: str | None = None, *options: str) -> Parents:
        """Parents of a language model; those of a folder share further options."""
        path = ("--data.path", self.paths["corpus"]) if "corpus" in self.paths else ()
        folder = folder or ("text" if family == "bert" else family)
        return Parents(f"{family}-{self.scale.corpus}.yaml", self.runs / folder, (*self.scale.text, *path, *options))
