"""What is measured and written of a fused model."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from fusionpl.cli.fusing import PRESET
from fusionpl.cli.jobs.alternative import alternatives
from fusionpl.cli.jobs.cards import command_section, fused_card, metadata
from fusionpl.cli.jobs.parents import Job
from fusionpl.evaluation.bench import Cost, Made
from fusionpl.evaluation.encoders import bench_for
from fusionpl.evaluation.measuring import Beside, measure
from fusionpl.evaluation.report import Report
from fusionpl.fusion.result import FusionResult
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
    report = Report(config=asked.settings, notes=[*result.warnings, *result.notes, *job.remarks])
    if asked.args.report != "none":
        parents = {name: partial(job.load, name) for name in asked.parents}
        beside = Beside(parents, others, alternatives(job, cost.seconds))
        measure(bench_for(report, job.data, job.device), result, cost, beside, full=asked.args.report == "full")
    return report


def write_fused(folder: Path, job: Job, strategy: str, ancestors: Sequence[Ancestor], report: Report) -> None:
    """Writes what stands around the weights: settings, tokenizer, report and card.

    Args:
        folder: of the run; `model/` is there.
        job: what was asked for.
        strategy: of the fusion.
        ancestors: the parents, as the card tells of them.
        report: what was measured.
    """
    asked, model = job.asked, folder / "model"
    write_settings(folder, asked.settings)
    if job.tokenizer is not None:
        job.tokenizer.save_pretrained(model)
        forget_places(model)
    report.save(folder / "report")
    figures = next((row.as_dict() for row in report.rows if row.name == "fused"), {})
    data = metadata(asked.settings, figures, asked.output.name) | lineage(ancestors, "merge")
    command = command_section("fuse", asked.argv, PRESET)
    body = fused_card(report, list(asked.parents), strategy, parents_section(ancestors), command)
    write_card(model, library_of(job.team.reference.module), body, data | {"tags": ["fusionpl", "merge"]})
