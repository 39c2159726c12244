"""What is measured and written of a fused model."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fusionpl.cli.fusing import PRESET
from fusionpl.cli.jobs.alternative import alternatives
from fusionpl.cli.jobs.cards import command_section, fused_card, heads_section, metadata
from fusionpl.cli.jobs.next_steps import after_fusion
from fusionpl.cli.jobs.parents import Job
from fusionpl.datamodules.separate import SeparateSplits
from fusionpl.evaluation.bench import Cost, Made
from fusionpl.evaluation.encoders import bench_for
from fusionpl.evaluation.measuring import Beside, measure
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import Row, known
from fusionpl.evaluation.separate import SeparateBench, measure_separate
from fusionpl.fusion.result import FusionResult
from fusionpl.models.folders import HEAD, heads_in
from fusionpl.models.lineage import Ancestor, lineage, parents_section
from fusionpl.models.save import forget_places, library_of, write_card
from fusionpl.options import write_settings


def measured(job: Job, result: FusionResult, cost: Cost, others: Mapping[str, Made]) -> Report:
    """The report of a fusion, as far as `--report` asks for it.

    Args:
        job: what was asked for.
        result: of the fusion.
        cost: of the fusion.
        others: row -> another fused model to compare with, and its cost.
    """
    asked = job.asked
    report = Report(config=asked.settings, changed=asked.changed, notes=[*result.warnings, *result.notes, *job.remarks])
    if asked.args.report != "none":
        parents = {name: partial(job.load, name) for name in asked.parents}
        beside, full = Beside(parents, others, alternatives(job, cost.seconds)), asked.args.report == "full"
        if isinstance(job.data, SeparateSplits):
            measure_separate(SeparateBench(report, job.data, job.device), result, cost, beside, full=full)
        else:
            measure(bench_for(report, job.data, job.device), result, cost, beside, full=full)
    report.steps = after_fusion(report, asked, result.config)
    return report


def write_fused(folder: Path, job: Job, strategy: str, ancestors: Sequence[Ancestor], report: Report) -> None:
    """Writes what stands around the weights: settings, tokenizer, report and card.

    Args:
        folder: of the run; `model/`, or the models of all heads, are there.
        job: what was asked for.
        strategy: of the fusion.
        ancestors: the parents, as the card tells of them.
        report: what was measured.
    """
    asked, sections = job.asked, [parents_section(ancestors)]
    write_settings(folder, asked.settings)
    report.save(folder / "report")
    apart = isinstance(job.data, SeparateSplits)
    if apart:
        sections += [heads_section([model.name for model in heads_in(folder).values()], asked.output.name)]
    body = fused_card(report, list(asked.parents), strategy, *sections, command_section("fuse", asked.argv, PRESET))
    for model, figures, settings in _by_head(folder, job, report) if apart else _of_all(folder, job, report):
        if job.tokenizer is not None:
            job.tokenizer.save_pretrained(model)
            forget_places(model)
        data = metadata(settings, figures, asked.output.name) | lineage(ancestors, "merge")
        write_card(model, library_of(job.team.reference.module), body, data | {"tags": ["fusionpl", "merge"]})


Written = tuple[Path, Mapping[str, Any], Mapping[str, Any]]  # a model's folder, its figures, and settings


def _of_all(folder: Path, job: Job, report: Report) -> list[Written]:
    """The one model."""
    figures = next((row.as_dict() for row in report.rows if row.name == "fused"), {})
    return [(folder / "model", figures, job.asked.settings)]


def _by_head(folder: Path, job: Job, report: Report) -> list[Written]:
    """The model of each head, with its figure on the data of its own parent."""
    asked = job.asked
    row = next((row for row in report.rows if row.name == "fused"), Row("fused"))
    tasks, metrics = row.tasks or {}, row.metrics or {}
    written: list[Written] = []
    for name, head, own in zip(asked.parents, job.team.heads, asked.args.own_data, strict=True):
        figures = {metrics[name]: tasks[name]} if known(tasks.get(name)) else {}
        written.append((folder / f"{HEAD}{head.name}", figures, {"task": asked.args.task, "data": own}))
    return written
