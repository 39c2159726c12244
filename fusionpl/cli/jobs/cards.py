"""Model cards of what was fused or finetuned: metadata that the hub reads, parents, and the command."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from fusionpl import __version__
from fusionpl.cli.parsing import configs_in
from fusionpl.datamodules.config import BUILT_IN
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import FIGURES
from fusionpl.models.hub import hub_id, short_name
from fusionpl.models.lineage import ancestor, inherited, lineage, parents_section
from fusionpl.paths import public, public_command
from fusionpl.training.tasks import TASKS

# The hub's names of metrics, where they are not those of a report.
METRICS = {"matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}
HOW = {
    "transport": "Aligned with optimal transport and averaged by fusionpl "
    "([Transformer Fusion with Optimal Transport](https://arxiv.org/abs/2310.05719)).",
    "head": "One parent, whose head alone fusionpl fitted to what all of them predict.",
    "joint": "Fitted by fusionpl to one residual stream that holds the parents' streams.",
}

MadeOf = tuple[str, dict[str, Any]]  # a section of the card, and metadata


def fused_card(report: Report, names: Sequence[str], strategy: str, *sections: str) -> str:
    """The model card of a fused model.

    Args:
        report: of the fusion.
        names: of the parents.
        strategy: of the fusion.
        sections: what follows the report.
    """
    body = report.markdown(steps=False).partition("\n")[2].strip()
    return "\n\n".join([f"# Fused from {', '.join(names)}", HOW[strategy], body, *sections])


def heads_section(folders: Iterable[str], run: str) -> str:
    """What the card of a model says of the others that share its trunk.

    Args:
        folders: the names of all heads.
        run: the folder's name.
    """
    return (
        f"## Heads\n\nOne of {', '.join(folders)}, whose trunks are the same. "
        f'`fusionpl.load_models("{run}")` keeps that once in memory, and `fusionpl.predict` takes a batch through it '
        "once for all heads."
    )


def made_of(model: str, origin: Mapping[str, Any]) -> MadeOf:
    """What a finetuned model's card says of where it comes from: of a fused model's parents what was known when it was
    fused.

    Args:
        model: that is finetuned.
        origin: the settings of the run that made it; empty where none did.
    """
    if "parents" in origin:
        section, data = inherited(Path(model) / "model")
        return section, data | {"tags": ["fusionpl", "merge"]}
    ancestors = [ancestor(short_name(model), model)]
    return parents_section(ancestors), lineage(ancestors, "finetune")


def command_section(command: str, argv: Sequence[str], preset: Path) -> str:
    """The command that made a model as a section of its card, with the preset it used by default.

    Args:
        command: `fuse` or `finetune`.
        argv: its arguments, as they were given.
        preset: what is used without `--config`.
    """
    words = ["fusionpl", command, *([] if configs_in(argv) else ["--config", preset.stem]), *argv]
    return f"## Command\n\nWith fusionpl {__version__}:\n\n```bash\n{public_command(words)}\n```"


def metadata(settings: Mapping[str, Any], figures: Mapping[str, float], name: str) -> dict[str, Any]:
    """What the hub reads of a model besides its parents: its task, its data set, and what it measured.

    Args:
        settings: of the command that made it, with `task` and `data`.
        figures: what was measured of it on the test split, of which those are taken that reports show.
        name: of the model.
    """
    task, path = TASKS[settings["task"]].pipeline, settings["data"]["path"]
    own = settings.get("own_data") or []  # of parents that have some, of which no single one was tested on
    paths = dict.fromkeys([each["path"] for each in own] or [path])
    on_hub = [one for one in paths if one not in BUILT_IN and hub_id(one) is not None]
    results = [
        EvalResult(
            task_type=task,
            dataset_type=public(path),
            dataset_name=public(path),
            dataset_config=settings["data"].get("name"),
            dataset_split="test",
            metric_type=METRICS.get(metric, metric),
            metric_value=figures[metric],
        )
        for metric in FIGURES
        if metric in figures and not own
    ]
    measured = {"eval_results": results, "model_name": name} if results else {}
    return {"pipeline_tag": task, **({"datasets": on_hub} if on_hub else {}), **measured}
