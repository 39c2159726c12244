"""What is measured of language models: masked-language-model loss, then SST-2 and TREC."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

from torch import nn

from benchmarks.common import (
    DEFAULT,
    EXACT,
    PAIRS,
    PAPER,
    TRANSPORT,
    WEIGHTS,
    Figures,
    Maker,
    Parents,
    finetuned,
    plain_average,
)
from fusionpl.datamodules.base import FixedSplits
from fusionpl.datamodules.config import TextClassificationConfig
from fusionpl.datamodules.text_classification import TextClassificationDataModule
from fusionpl.evaluation.metrics import evaluate, evaluate_ensemble
from fusionpl.fusion.config import FuseConfig, load_config
from fusionpl.fusion.fuse import fuse
from fusionpl.models.tokenizers import load_tokenizer
from fusionpl.training.tasks import TaskName

Measure = Callable[[], Figures]
TEXT: dict[str, Any] = {"calibration.tokens": "all", "anchor": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "OT soft (paper)": TEXT,
    "OT hard (EMD)": {**TEXT, "align.solver": "emd"},
    "OT soft, residual skip": {**TEXT, "align.residual": "skip"},
    "OT soft, residual branch": {**TEXT, "align.residual": "branch"},
    "OT soft, residual tie": {**TEXT, "align.residual": "tie"},
    "permutations": {**TEXT, **EXACT},
    "OT weights soft (0.06)": {**TEXT, **WEIGHTS},
}
BERT_ROWS = (
    *VARIANTS, "OT soft (paper) + refit", "permutations + refit", "transport + refit", "default",
)  # fmt: skip
FINETUNED = ("best parent", "vanilla", "OT soft (paper)", "OT hard (EMD)", "transport + refit", "default")
CLASSIFIERS = ("vanilla", "OT soft (paper)", "default")
EPOCHS = 3
ONE_SHOT, AFTER = "one-shot", f"after {EPOCHS} epochs"
TASKS: dict[str, TaskName] = {
    "bert": "masked-lm",
    "gpt2": "causal-language-modeling",
    "llama": "causal-language-modeling",
    "t5": "span-corruption",
}
ROTATION: dict[str, Any] = {**TEXT, **EXACT, "align.stream": "rotation", "align.scaling": "two_sided"}
# The rows of the table of families, all of which are finetuned, and those that a family has not: streams of BERTs can't
# be rotated, and T5's default is transport.
FAMILY_ROWS = (
    "OT soft (paper)", "permutations + refit", "rotations + refit", "transport + refit", "default",
)  # fmt: skip
WITHOUT = {"bert": ("rotations + refit",), "t5": ("rotations + refit", "transport + refit")}


def fused_models(parents: Parents, pair: tuple[int, int]) -> dict[str, Maker]:
    """Name -> what makes the model, from parents and calibration data that are loaded once."""
    models = cache(lambda: parents.models(pair))
    calibration = cache(lambda: list(parents.data(pair[0]).calibration_dataloader()))

    configs = {name: load_config(PAPER, changes) for name, changes in VARIANTS.items()}
    configs |= {f"{name} + refit": load_config(PAPER, {**VARIANTS[name], "refit.method": "ridge"})
                for name in ("OT soft (paper)", "permutations")}  # fmt: skip
    configs["rotations + refit"] = load_config(PAPER, {**ROTATION, "refit.method": "ridge"})
    configs["transport + refit"] = load_config(TRANSPORT)
    configs["default"] = load_config(DEFAULT)
    made: dict[str, Maker] = {
        name: partial(lambda config: fuse(models(), calibration(), config).model, config)
        for name, config in configs.items()
    }
    return {"vanilla": lambda: plain_average(models()), **made}


def language(
    parents: Parents,
    pair: tuple[int, int],
    task: TaskName = "masked-lm",
    rows: Sequence[str] = BERT_ROWS,
    finetuning: Sequence[str] = FINETUNED,
) -> dict[str, Measure]:
    """Name -> what measures its test loss, and after finetuning where that is shown; `rows` are the fused models."""
    models = cache(lambda: parents.models(pair))
    data = cache(lambda: parents.data(pair[0]))
    test = cache(lambda: list(data().test_dataloader()))
    losses = cache(lambda: [evaluate(model, test())["loss"] for model in models()])

    def measure(name: str, make: Maker) -> Figures:
        return losses_of(make(), data(), task, pair[0] if name in finetuning else None)

    made = {
        "best parent": lambda: models()[losses().index(min(losses()))],
        **{name: make for name, make in fused_models(parents, pair).items() if name in ("vanilla", *rows)},
    }
    return {
        "parents, mean": lambda: {ONE_SHOT: statistics.mean(losses())},
        "ensemble": lambda: {ONE_SHOT: evaluate_ensemble(models(), test())["loss"]},
        **{name: partial(measure, name, make) for name, make in made.items()},
    }


def losses_of(model: nn.Module, data: FixedSplits, task: TaskName, seed: int | None) -> Figures:
    """The test loss of a language model, and after finetuning with a seed."""
    figures = {ONE_SHOT: evaluate(model, data.test_dataloader())["loss"]}
    if seed is not None:
        figures[AFTER] = finetuned(model, data, task, "default.yaml", seed=seed, epochs=EPOCHS)["loss"]
    return figures


def of_depths(family: str, groups: Sequence[Parents], seeds: tuple[int, int]) -> dict[str, Measure]:
    """Name -> what measures a deep and a shallow parent, their ensemble and their fusions into either."""
    data = cache(lambda: groups[0].data(seeds[0]))
    models = cache(lambda: [one.models([seed])[0] for one, seed in zip(groups, seeds, strict=True)])

    def measured(make: Maker) -> Figures:
        return losses_of(make(), data(), TASKS[family], seeds[0])

    def fused(config: FuseConfig) -> nn.Module:
        return fuse(models(), data().calibration_dataloader(), config).model

    made: dict[str, Maker] = {"deep parent": lambda: models()[0], "shallow parent": lambda: models()[1]}
    for anchor, direction in ((1, "deep into shallow"), (0, "shallow into deep")):
        for name, file in (("transport + refit", TRANSPORT), ("default", DEFAULT)):
            made[f"{direction}, {name}"] = partial(fused, load_config(file, {"anchor": anchor}))
    return {
        "ensemble": lambda: {ONE_SHOT: evaluate_ensemble(models(), data().test_dataloader())["loss"]},
        **{name: partial(measured, make) for name, make in made.items()},
    }


def of_family(family: str, parents: Parents, pair: tuple[int, int]) -> dict[str, Measure]:
    """The same for the rows that a family has."""
    rows = [name for name in FAMILY_ROWS if name not in WITHOUT.get(family, ())]
    return language(parents, pair, TASKS[family], rows, ("best parent", "vanilla", *rows))


@dataclass(frozen=True)
class Classifying:
    """A task that language models are finetuned on.

    Attributes:
        parents: the language models.
        task: sst2 or trec.
        path: its data.
        limit: training sentences; None for all.
    """

    parents: Parents
    task: str
    path: str
    limit: int | None

    @cached_property
    def data(self) -> TextClassificationDataModule:
        tokenizer = load_tokenizer(self.parents.folder(PAIRS[0][0]))
        return TextClassificationDataModule(
            TextClassificationConfig(path=self.path, train_limit=self.limit), 0, tokenizer
        )

    def accuracy(self, make: Maker) -> Figures:
        """Test accuracy after finetuning."""
        figures = finetuned(make(), self.data, "text-classification", f"{self.task}.yaml", seed=0)
        return {self.task: figures["accuracy"]}

    @cache  # noqa: B019 -- every parent is in two pairs, and the process ends with the table
    def of_parent(self, seed: int) -> float:
        return self.accuracy(lambda: self.parents.models([seed])[0])[self.task]

    def measures(self, pair: tuple[int, int]) -> dict[str, Measure]:
        """Name -> what measures the parents, vanilla and fused models."""
        made = fused_models(self.parents, pair)
        return {
            "parents, mean": lambda: {self.task: statistics.mean(map(self.of_parent, pair))},
            "best parent": lambda: {self.task: max(map(self.of_parent, pair))},
            **{name: partial(self.accuracy, made[name]) for name in CLASSIFIERS},
        }
