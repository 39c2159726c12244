"""What is measured of language models: masked-language-model loss, then SST-2 and TREC."""

import statistics
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from benchmarks.common import DEFAULT, EXACT, PAPER, WEIGHTS, Figures, Maker, Parents, finetuned, plain_average
from fusionpl.datamodules import TextClassificationConfig, TextClassificationDataModule
from fusionpl.evaluation import evaluate, evaluate_ensemble
from fusionpl.fusion import fuse, load_config
from fusionpl.models import load_tokenizer

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
FINETUNED = ("best parent", "vanilla", "OT soft (paper)", "OT hard (EMD)", "default")
CLASSIFIERS = ("vanilla", "OT soft (paper)", "default")
EPOCHS = 3
ONE_SHOT, AFTER = "one-shot", f"after {EPOCHS} epochs"
PRESETS = {"pydoc": "bert-pydoc.yaml", "wikitext2": "bert-wikitext2.yaml"}


def fused_models(parents: Parents, pair: tuple[int, int]) -> dict[str, Maker]:
    """Name -> what makes the model, from parents and calibration data that are loaded once."""
    models = cache(lambda: parents.models(pair))
    calibration = cache(lambda: list(parents.data(pair[0]).calibration_dataloader()))

    configs = {name: load_config(PAPER, changes) for name, changes in VARIANTS.items()}
    configs |= {f"{name} + refit": load_config(PAPER, {**VARIANTS[name], "refit.method": "ridge"})
                for name in ("OT soft (paper)", "permutations")}  # fmt: skip
    configs["default"] = load_config(DEFAULT)
    configs["default, residual tie"] = load_config(DEFAULT, {"align.residual": "tie"})
    made: dict[str, Maker] = {
        name: partial(lambda config: fuse(models(), calibration(), config).model, config)
        for name, config in configs.items()
    }
    return {"vanilla": lambda: plain_average(models()), **made}


def language(parents: Parents, pair: tuple[int, int]) -> dict[str, Measure]:
    """Name -> what measures its test loss, and after finetuning where that is shown."""
    models = cache(lambda: parents.models(pair))
    data = cache(lambda: parents.data(pair[0]))
    test = cache(lambda: list(data().test_dataloader()))
    losses = cache(lambda: [evaluate(model, test())["loss"] for model in models()])

    def measure(name: str, make: Maker) -> Figures:
        model = make()
        figures = {ONE_SHOT: evaluate(model, test())["loss"]}
        if name in FINETUNED:
            after = finetuned(model, data(), "masked-lm", "default.yaml", seed=pair[0], epochs=EPOCHS)
            figures[AFTER] = after["loss"]
        return figures

    made = {"best parent": lambda: models()[losses().index(min(losses()))], **fused_models(parents, pair)}
    return {
        "parents, mean": lambda: {ONE_SHOT: statistics.mean(losses())},
        "ensemble": lambda: {ONE_SHOT: evaluate_ensemble(models(), test())["loss"]},
        **{name: partial(measure, name, make) for name, make in made.items()},
    }


def classification(
    parents: Parents, pair: tuple[int, int], task: str, path: str, limit: int | None
) -> dict[str, Measure]:
    """Name -> what measures the test accuracy after finetuning on a task: the parents, vanilla and fused."""
    config = TextClassificationConfig(path=path, train_limit=limit)
    data = cache(lambda: TextClassificationDataModule(config, 0, load_tokenizer(parents.folder(pair[0]))))

    def accuracy(make: Maker) -> float:
        return finetuned(make(), data(), "text-classification", f"{task}.yaml", seed=0)["accuracy"]

    def of_parent(seed: int) -> Figures:
        return {task: accuracy(lambda: parents.models([seed])[0])}

    def own() -> list[float]:
        # every parent is in two pairs
        return [parents.cell(f"{task} parent {seed}", partial(of_parent, seed))[task] for seed in pair]

    made = fused_models(parents, pair)
    return {
        "parents, mean": lambda: {task: statistics.mean(own())},
        "best parent": lambda: {task: max(own())},
        **{name: partial(lambda make: {task: accuracy(make)}, made[name]) for name in CLASSIFIERS},
    }
