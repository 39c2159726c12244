"""The report and the card of a finetuned model."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.loggers import Logger

from fusionpl.cli.finetune import PRESET, Asked
from fusionpl.cli.jobs.cards import MadeOf, command_section
from fusionpl.cli.jobs.next_steps import after_finetuning
from fusionpl.cli.jobs.push import push_run
from fusionpl.cli.jobs.summary import print_summary
from fusionpl.evaluation.outcomes import Outcomes, load_outcomes, save_outcomes
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import Row
from fusionpl.evaluation.scores import Scores
from fusionpl.files import write_json
from fusionpl.models.save import add_to_card
from fusionpl.options import settings_in
from fusionpl.training.dashboard import log_report
from fusionpl.training.loggers import finish_loggers, make_loggers
from fusionpl.training.weights_and_biases import group_of

DONE, SAMPLES = "metrics.json", "samples.safetensors"
OF_TASK = "tasks/"  # what the names of outcomes begin with that are of one parent's data


@dataclass(frozen=True)
class Tested:
    """What was measured of a finetuned model.

    Attributes:
        row: of the report.
        outcomes: what it did on each test sample, where that is known.
        tasks: name of a parent with data of its own -> what it did on these.
    """

    row: Row
    outcomes: Outcomes | None
    tasks: Mapping[str, Scores]

    @classmethod
    def read(cls, metrics: Path, samples: Path) -> "Tested":
        """Reads what `write` wrote."""
        row, outcomes_of = Row(**json.loads(metrics.read_text())), load_outcomes(samples)
        named = {task: (metric, OF_TASK + task) for task, metric in (row.metrics or {}).items()}
        tasks = {task: Scores(metric, outcomes_of[of].values) for task, (metric, of) in named.items()}
        return cls(row, outcomes_of.get(row.name), tasks)

    def write(self, metrics: Path, samples: Path) -> None:
        """Writes what `read` reads, the row last."""
        outcomes_of = {OF_TASK + name: Outcomes(scores.values) for name, scores in self.tasks.items()}
        outcomes_of |= {} if self.outcomes is None else {self.row.name: self.outcomes}
        if outcomes_of:
            save_outcomes(samples, outcomes_of)
        write_json(metrics, self.row.as_dict())


def finish(asked: Asked, origins: Mapping[str, MadeOf], rows: Sequence[Tested], started: float) -> None:
    """Adds the rows to the report of the fused model, prints it, completes the model's card, pushes it where that is
    asked for, and ends with the summary.

    Args:
        asked: what was asked for.
        origins: name of a model's folder -> what its card says of where it comes from, and what the hub reads of it.
        rows: what was measured of every candidate, the model itself first.
        started: when the command was, by `time.monotonic`.
    """
    first = rows[0].row
    report, home = _reported(asked, rows)
    loggers = loggers_of(asked, first.name, asked.folder, resume=True)  # the first candidate's run goes on
    log_report(loggers, report, home)
    dashboard = finish_loggers(loggers)
    print(f"\n{report.table()}")
    _print_share(asked, first)
    words = [word for word in asked.argv if word != "--resume"]
    for name, (parents, data) in origins.items():
        card = asked.folder / name
        for verdict in report.verdicts:
            if verdict.stage == "finetuned":
                add_to_card(card, f"**{verdict.words}**")
        add_to_card(card, f"{parents}\n\n{command_section('finetune', words, PRESET)}".lstrip(), data)
    options = asked.options
    if options.push_to is not None:
        push_run(asked.folder, options.push_to, private=options.push_private)
    baselines = ["baselines/"] if len(rows) > 1 else []
    models = ", ".join([*(f"{path.name}/" for path in asked.heads.values())] or ["model/", *baselines])
    made = f"{asked.folder}: {models}; {home / 'report.html'}"
    print_summary(made, time.monotonic() - started, dashboard, report.steps)


def loggers_of(asked: Asked, name: str, place: Path, *, resume: bool) -> list[Logger]:
    """The loggers of a candidate's run."""
    options = asked.options
    return make_loggers(
        options.logger, place, name=f"finetune {name}", job="finetune", group=group_of([options.model]),
        config={**asked.settings, "origin": settings_in(options.model)}, resume=resume,
    )  # fmt: skip


def _reported(asked: Asked, rows: Sequence[Tested]) -> tuple[Report, Path]:
    """The report of the fused model with the rows, or else one of this run, written; and where."""
    theirs, own = Path(asked.options.model) / "report", asked.folder / "report"
    known = not asked.elsewhere and (theirs / "report.json").is_file()
    report, home = (Report.load(theirs), theirs) if known else (Report(), own)
    # Rows of an earlier finetuning may stay; what was finetuned otherwise is not compared.
    report.outcomes = {key: outcome for key, outcome in report.outcomes.items() if key[1] != "finetuned"}
    for one in rows:
        report.add(one.row, one.outcomes, one.tasks)
    report.config["finetune"], report.changed["finetune"] = asked.settings, asked.changed
    report.steps = after_finetuning(report, asked)
    report.save(home)
    return report, home


def _print_share(asked: Asked, row: Row) -> None:
    """Says how long it took beside the training of a parent, where that is known."""
    origin = asked.origin
    parent = settings_in(Path(origin["parents"][0])) if origin.get("parents") else origin
    whole, epochs = parent.get("trainer", {}).get("max_epochs"), row.epochs
    if whole and epochs:
        print(f"\nfinetuning took {epochs:g} epochs, {100 * epochs / whole:.0f} % of a parent's {whole}")
