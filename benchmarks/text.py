"""BERT over pairs of seeds: masked-language-model loss one-shot and finetuned, then SST-2 and TREC.

    python -m benchmarks.text pydoc --runs runs/bert --output docs/results/bert-pydoc.md \
        --sst2 ../shared/data/sst2 --trec ../shared/data/trec
    python -m benchmarks.text wikitext2 --runs runs/wikitext2 --output docs/results/bert-wikitext2.md \
        --data.path ../shared/data/wikitext2

Parents and cells that are in --runs are used as they are, so a run that was stopped goes on.
"""

import argparse
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.common import PAIRS, Parents, finetuned, markdown, mean_and_deviation
from fusionpl.cli.common import CONF, quiet
from fusionpl.datamodules import TextClassificationConfig, TextClassificationDataModule
from fusionpl.evaluation import evaluate, evaluate_ensemble
from fusionpl.fusion import fuse, load_config, vanilla
from fusionpl.models import load_tokenizer

PAPER, DEFAULT = CONF / "fuse" / "paper.yaml", CONF / "fuse" / "default.yaml"
TEXT: dict[str, Any] = {"calibration.tokens": "all", "anchor": 0}
EXACT: dict[str, Any] = {"align.residual": "tie", "align.heads": "matched", "align.solver": "assignment"}
VARIANTS: dict[str, dict[str, Any]] = {
    "OT soft (paper)": TEXT,
    "OT hard (EMD)": {**TEXT, "align.solver": "emd"},
    "OT soft, residual skip": {**TEXT, "align.residual": "skip"},
    "OT soft, residual branch": {**TEXT, "align.residual": "branch"},
    "OT soft, residual tie": {**TEXT, "align.residual": "tie"},
    "permutations": {**TEXT, **EXACT},
    "OT weights soft (0.06)": {**TEXT, "align.evidence": "weights", "align.reg": 0.06},
}
FINETUNED = ("best parent", "vanilla", "OT soft (paper)", "OT hard (EMD)", "permutations", "default.yaml")
EPOCHS = 3
PRESETS = {"pydoc": "bert-pydoc.yaml", "wikitext2": "bert-wikitext2.yaml"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", choices=PRESETS)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=len(PAIRS), help="how many pairs of seeds")
    parser.add_argument("--sst2", help="where SST-2 is, to finetune for it")
    parser.add_argument("--trec", help="where TREC is, to finetune for it")
    parser.add_argument("--sentences", type=int, help="finetune on at most this many of each; all if not given")
    args, options = parser.parse_known_args()
    quiet()
    parents = Parents(PRESETS[args.corpus], args.runs, tuple(options))
    pairs = PAIRS[: args.pairs]
    losses: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    accuracies: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    tasks = {name: path for name, path in (("sst2", args.sst2), ("trec", args.trec)) if path}
    for pair in pairs:
        for name, figures in language(parents, pair).items():
            for stage, value in figures.items():
                losses[name][stage].append(value)
        for task, path in tasks.items():
            for name, accuracy in classification(parents, pair, task, path, args.sentences).items():
                accuracies[name][task].append(accuracy)
    unigram = parents.cell("unigram", lambda: parents.data().baseline())["unigram_loss"]
    rows = [[name, *(mean_and_deviation(found[stage], "loss") for stage in ("loss", "finetuned"))]
            for name, found in losses.items()]  # fmt: skip
    text = (
        f"Masked-language-model loss (nats) on the test part of {args.corpus}, mean ± standard deviation over "
        f"{len(pairs)} pair(s) of seeds; predicting by frequency: {unigram:.3f}.\n\n"
        + markdown(["", "one-shot", f"after {EPOCHS} epochs of finetuning"], rows)
    )
    if tasks:
        rows = [[name, *(mean_and_deviation(found[task]) for task in tasks)] for name, found in accuracies.items()]
        text += "\n\nTest accuracy after finetuning a classifier on the encoder, over the same pairs"
        text += f"; {args.sentences} training sentences.\n\n" if args.sentences else ".\n\n"
        text += markdown(["", *tasks], rows)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text + "\n")
    print(text)


def fused_models(models: list[nn.Module], calibration: list[Any]) -> dict[str, Any]:
    """Name -> a function that makes the model."""
    configs = {name: load_config(PAPER, changes) for name, changes in VARIANTS.items()}
    configs |= {f"{name} + refit": load_config(PAPER, {**VARIANTS[name], "refit.method": "ridge"})
                for name in ("OT soft (paper)", "permutations")}  # fmt: skip
    configs["default.yaml"] = load_config(DEFAULT)
    made = {name: lambda config=config: fuse(models, calibration, config).model for name, config in configs.items()}
    return {"vanilla": lambda: vanilla(models, [0.5, 0.5]), **made}


def language(parents: Parents, pair: tuple[int, int]) -> dict[str, dict[str, float]]:
    data = parents.data(pair[0])
    test, calibration = list(data.test_dataloader()), list(data.calibration_dataloader())
    models = parents.models(pair)
    losses = [evaluate(model, test)["loss"] for model in models]
    best = models[losses.index(min(losses))]
    found = {
        "parents, mean": {"loss": statistics.mean(losses)},
        "ensemble": parents.cell(f"{pair} ensemble", lambda: {"loss": evaluate_ensemble(models, test)["loss"]}),
    }
    for name, make in {"best parent": lambda: best, **fused_models(models, calibration)}.items():

        def measure(name: str = name, make: Any = make) -> dict[str, float]:
            model = make()
            figures = {"loss": evaluate(model, test)["loss"]}
            if name in FINETUNED:
                after = finetuned(
                    model, data, "masked-lm", "default.yaml", parents.runs / "finetuned", seed=pair[0], epochs=EPOCHS
                )
                figures["finetuned"] = after["loss"]
            return figures

        found[name] = parents.cell(f"{pair} {name}", measure)
    return found


def classification(
    parents: Parents, pair: tuple[int, int], task: str, path: str, limit: int | None
) -> dict[str, float]:
    """Test accuracies after the same finetuning: the two parents' mean, the better of them, vanilla and fused."""
    models = parents.models(pair)
    calibration = list(parents.data(pair[0]).calibration_dataloader())
    config = TextClassificationConfig(path=path, train_limit=limit)
    data = TextClassificationDataModule(config, 0, load_tokenizer(parents.folder(pair[0])))

    def accuracy(name: str, make: Any, seed: int) -> float:
        def measure() -> dict[str, float]:
            place = parents.runs / "finetuned"
            return finetuned(make(), data, "text-classification", f"{task}.yaml", place, seed=seed)

        return parents.cell(f"{task} {name}", measure)["accuracy"]

    own = [accuracy(f"parent {seed}", lambda model=model: model, 0) for seed, model in zip(pair, models, strict=True)]
    made = fused_models(models, calibration)
    return {"parents, mean": statistics.mean(own), "best parent": max(own)} | {
        name: accuracy(f"{pair} {name}", made[name], 0) for name in ("vanilla", "OT soft (paper)", "default.yaml")
    }


if __name__ == "__main__":
    main()
