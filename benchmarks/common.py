"""What the benchmarks share: presets, parents that are trained once, finetuning, Markdown."""

import copy
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from torch import nn

from fusionpl.cli import train
from fusionpl.datamodules.base import FixedSplits
from fusionpl.fusion.average import vanilla
from fusionpl.models.heads import with_classifier
from fusionpl.models.load import load_model
from fusionpl.models.tokenizers import load_tokenizer
from fusionpl.options import settings_in
from fusionpl.presets import CONF
from fusionpl.training.config import OptimConfig
from fusionpl.training.data import DATA_MODULES
from fusionpl.training.fit import fit
from fusionpl.training.tasks import TASKS, TaskName, task_named

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Figures = Mapping[str, float]  # column -> figure
Maker = Callable[[], nn.Module]
PAPER, DEFAULT, TRANSPORT, JOINT = (
    CONF / "fuse" / f"{name}.yaml" for name in ("paper", "default", "transport", "joint")
)
# Options under which an aligned parent keeps its function.
EXACT: dict[str, Any] = {"align.residual": "tie", "align.heads": "matched", "align.solver": "assignment"}
WEIGHTS: dict[str, Any] = {"align.evidence": "weights", "align.reg": 0.06}
# Three parents make three pairs: each parent is in two of them.
PAIRS = ((1, 2), (2, 3), (3, 1))


@dataclass(frozen=True)
class Parents:
    """Parents of one preset, kept in `runs`/seed-N and trained when they are not there.

    Attributes:
        preset: file of conf/train.
        runs: where the runs are kept.
        options: further options of train.py.
    """

    preset: str
    runs: Path
    options: tuple[str, ...] = ()

    def folder(self, seed: int) -> Path:
        """The run of a seed; trains it first if need be."""
        folder = self.runs / f"seed-{seed}"
        if not (folder / "model").is_dir():
            words = ["--config", str(CONF / "train" / self.preset), "--seed", str(seed), "--output", str(folder)]
            begun = (folder / "checkpoints" / "last.ckpt").is_file()  # a long training may take several sittings
            train.run([*words, "--resume" if begun else "--overwrite", "--logger", "csv", *self.options])
        return folder

    def models(self, seeds: Iterable[int]) -> list[nn.Module]:
        """The trained models of some seeds."""
        return [load_model(self.folder(seed)) for seed in seeds]

    def data(self, seed: int = 1, **changes: Any) -> FixedSplits:
        """The data that the parents were trained on, with the tokenizer they share."""
        run = self.folder(seed)
        settings = settings_in(run)
        task = task_named(settings.get("task", "image-classification"))
        options = TASKS[task].data(**settings["data"] | changes)
        return DATA_MODULES[task](options, seed, load_tokenizer(run))


def plain_average(models: Sequence[nn.Module]) -> nn.Module:
    """Vanilla fusion with equal weights, of parents of one width."""
    model = vanilla(models, [1 / len(models)] * len(models))
    assert model is not None, "parents of different width have no plain average"
    return model


def finetuned(
    model: nn.Module,
    data: FixedSplits,
    task: TaskName,
    preset: str,
    *,
    seed: int,
    epochs: int | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Test figures of a copy of `model` after the finetuning of a file of conf/finetune.

    Args:
        model: of a timm or transformers class.
        data: what it is finetuned and tested on.
        task: for text classification it gets a new head.
        preset: the file's name.
        seed: decides the new head and augmentation.
        epochs: others than the file's.
        trainer: arguments of Lightning's Trainer beside the file's.
    """
    settings = yaml.safe_load((CONF / "finetune" / preset).read_text())
    L.seed_everything(seed, verbose=False)
    model = copy.deepcopy(model)
    if TASKS[task].new_head:
        model = with_classifier(model, data.num_classes, data.class_names, seed=seed, kind=data.kind)
    arguments = {**settings["trainer"], "enable_progress_bar": False, **(trainer or {})}
    optim = OptimConfig(**settings["optim"])
    arguments |= {"max_epochs": epochs} if epochs else {}
    # a folder of its own: two benchmarks may run side by side
    with tempfile.TemporaryDirectory() as folder:
        found = fit(
            model, data, optim, arguments, Path(folder),
            seed=seed, monitor=TASKS[task].monitor, mode=TASKS[task].mode,
        )  # fmt: skip
    return dict(found.figures)


def mean_and_deviation(values: Sequence[float], metric: str = "accuracy") -> str:
    """`97.3 ± 0.4 %` of accuracies, `3.214 ± 0.021` of losses; of one value, the value."""
    if not values:
        return ""
    scale, digits, unit = (100, 1, " %") if metric == "accuracy" else (1, 3, "")
    deviation = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.{digits}f}{deviation}{unit}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
