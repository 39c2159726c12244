"""The report of a fusion: rows, configuration, loss barriers and matchings as JSON, Markdown, pictures and a page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import Tensor

from fusionpl.errors import FusionError, reason
from fusionpl.evaluation import plots
from fusionpl.evaluation.barrier import Curve
from fusionpl.evaluation.html import axes_cells, page
from fusionpl.evaluation.keeping import Kept, kept
from fusionpl.evaluation.matched import MatchedAxis
from fusionpl.evaluation.on_tasks import OnTask, in_sentences, on_tasks, samples_in_words, task_cells
from fusionpl.evaluation.outcomes import Outcomes, load_outcomes, load_tensors, save_outcomes
from fusionpl.evaluation.plots import BARS, BLOCKS, CAPTIONS, LINE, MAPS
from fusionpl.evaluation.rows import (
    MODEL,
    Row,
    Stage,
    as_table,
    as_text_cells,
    best_parent,
    equal_cost_cells,
    readable,
)
from fusionpl.evaluation.scores import Scores
from fusionpl.evaluation.text import (
    CONTINUED,
    EQUAL_COST,
    OF_HEADS,
    OF_TASKS,
    WORDS,
    markdown_table,
    quoted,
    text_table,
)
from fusionpl.evaluation.verdict import Verdict, compared_cells, verdict_cells, verdicts
from fusionpl.files import beside, put_in_place
from fusionpl.paths import public_settings

SAMPLES, PICTURES = "samples.safetensors", "pictures.safetensors"


@dataclass
class Report:
    """Everything a fusion measured; `save` writes it, `load` reads it back to add the finetuned rows.

    Attributes:
        rows: one a model, in the order they were added.
        config: the configuration that was run (shown as YAML).
        barrier: interpolation curves by name, "vanilla" and "aligned".
        notes: what a reader should know, a line each.
        axes: how the units of a parent were matched, axis by axis; some with a picture.
        blocks: for parents of another depth, what `plots.blocks` draws.
        prompt: what language models went on with.
        continuations: how they did, by the name of the row.
        outcomes: (name, stage) of a row -> what it did on each test sample; the verdict is made of them.
        tasks: (name, stage) of a row -> for each parent with data of its own, what it did on them, see `Row.tasks`.
        scores: likewise where heads are kept apart; then there are no outcomes over all samples.
    """

    rows: list[Row] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    barrier: dict[str, Curve] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    axes: dict[str, MatchedAxis] = field(default_factory=dict)
    blocks: dict[str, tuple[Tensor, Sequence[int]]] = field(default_factory=dict)
    prompt: str = ""
    continuations: dict[str, str] = field(default_factory=dict)
    outcomes: dict[tuple[str, Stage], Outcomes] = field(default_factory=dict)
    tasks: dict[tuple[str, Stage], Mapping[str, Outcomes]] = field(default_factory=dict)
    scores: dict[tuple[str, Stage], Mapping[str, Scores]] = field(default_factory=dict)

    def add(self, row: Row, outcomes: Outcomes | None = None, tasks: Mapping[str, Outcomes] | None = None) -> None:
        """Adds a row; one of the same name and stage is replaced where it stands.

        Args:
            row: what a model measured.
            outcomes: what it did on each test sample.
            tasks: what it did on the data of each parent.
        """
        self.outcomes.pop((row.name, row.stage), None)
        self.tasks.pop((row.name, row.stage), None)
        if tasks:
            self.tasks[row.name, row.stage] = tasks
        if outcomes is not None:
            self.outcomes[row.name, row.stage] = outcomes
        for index, known_row in enumerate(self.rows):
            if (known_row.name, known_row.stage) == (row.name, row.stage):
                self.rows[index] = row
                return
        self.rows.append(row)

    def add_scores(self, row: Row, scores: Mapping[str, Scores]) -> None:
        """Adds a row of heads that are kept apart, or replaces it: see `add`.

        Args:
            row: what a network measured.
            scores: what it did on the data of each parent.
        """
        self.add(row)
        self.scores[row.name, row.stage] = scores

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdict on the fused model, before finetuning and after it; see `fusionpl.evaluation.verdict`."""
        return verdicts(self.rows, self.outcomes)

    @property
    def kept(self) -> list[Kept]:
        """What the fused model keeps of each parent that has data of its own."""
        tasks = {
            key: {task: Scores.accuracy(outcomes) for task, outcomes in found.items()}
            for key, found in self.tasks.items()
        }
        return kept(self.rows, tasks | self.scores)

    @property
    def on_tasks(self) -> list[OnTask]:
        """The fused network beside others on the task of each parent, where heads are kept apart."""
        return on_tasks(self.rows, self.scores)

    @property
    def of_tasks(self) -> str:
        """What the columns of tasks are, in words; empty where there are none."""
        return OF_HEADS if self.scores else OF_TASKS if self.tasks else ""

    def rows_as_table(self) -> tuple[list[str], list[list[Any]]]:
        """Column names and raw values (None where not measured), one-shot rows first; for `wandb.Table`."""
        return as_table(self.rows)

    def table(self) -> str:
        """The rows as aligned plain text, the loss barriers, what could be had at equal cost, and last the verdict."""
        parts = [text_table(as_text_cells(self.rows), left=2), *([self.of_tasks] if self.of_tasks else [])]
        if self.barrier:
            values = [f"{name} {readable('loss', curve.barrier)}" for name, curve in self.barrier.items()]
            parts.append(f"loss barrier: {', '.join(values)}")
        verdicts = self.verdicts
        if alternatives := self.alternatives(verdicts):
            parts.append(text_table(alternatives, left=2))
        if verdicts:
            words = [*(verdict.words for verdict in verdicts), *(each.words for each in self.kept)]
            parts += [text_table(verdict_cells(verdicts), left=1), "\n".join(words)]
        if judged := self.on_tasks:
            words = [*in_sentences(self.rows, judged), *(each.words for each in self.kept)]
            parts += [text_table(task_cells(judged), left=2), "\n".join(words)]
        if compared := compared_cells(self.rows, self.outcomes):
            parts.append(text_table(compared, left=1))
        return "\n\n".join(parts)

    def markdown(self, figures: tuple[str, ...] = ()) -> str:
        """The report as Markdown, with the configuration as YAML.

        Args:
            figures: which of the pictures lie next to the file and are embedded.
        """
        title = "# Evaluation" if best_parent(self.rows, MODEL) else "# Fusion report"
        parts = [title, markdown_table(as_text_cells(self.rows)), *([self.of_tasks] if self.of_tasks else [])]
        parts += _embedded(BARS, figures)
        verdicts = self.verdicts
        if verdicts:
            parts += [
                "## Verdict",
                *(f"**{verdict.words}**" for verdict in verdicts),
                *(["\n".join(f"- {found.words}" for found in self.kept)] if self.kept else []),
                markdown_table(verdict_cells(verdicts)),
            ]
            parts += [f"± is one standard error, from the same {verdicts[-1].difference.samples:,} test samples."]
        if judged := self.on_tasks:
            sentences = [f"**{sentence}**" for sentence in in_sentences(self.rows, judged)]
            parts += ["## Verdict", *sentences, "\n".join(f"- {found.words}" for found in self.kept)]
            parts += [markdown_table(task_cells(judged)), samples_in_words(judged)]
        if compared := compared_cells(self.rows, self.outcomes):
            parts += ["## Beside the best model", markdown_table(compared)]
        if alternatives := self.alternatives(verdicts):
            parts += ["## At equal cost", EQUAL_COST, markdown_table(alternatives)]
        if self.notes:
            parts += ["\n".join(f"- {note}" for note in self.notes)]
        if self.barrier:
            parts += ["## Loss barrier", markdown_table(self.barrier_cells())]
            parts += _embedded(LINE, figures)
        if BLOCKS in figures:
            parts += ["## Blocks", *_embedded(BLOCKS, figures)]
        if MAPS in figures:
            parts += ["## Transport maps", *_embedded(MAPS, figures)]
        if self.continuations:
            summary = [[name, quoted(text)] for name, text in {"prompt": self.prompt, **self.continuations}.items()]
            parts += ["## Continuations", CONTINUED, markdown_table([["", "text"], *summary])]
        if self.config:
            parts += ["## Configuration", f"```yaml\n{self.config_as_yaml()}```"]
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """The report as one page, with all that it shows in it."""
        sections = {"cost": plots.cost(self.rows), "barrier": plots.curves(self.barrier),
                    "blocks": plots.blocks(self.blocks), "maps": plots.maps(self.axes)}  # fmt: skip
        verdicts, on_tasks = self.verdicts, self.on_tasks
        return page(
            report=self,
            best=best_parent(self.rows, MODEL),
            verdicts=verdicts,
            kept=self.kept,
            sentences=in_sentences(self.rows, on_tasks),
            on_tasks=task_cells(on_tasks) if on_tasks else [],
            samples=samples_in_words(on_tasks),
            of_tasks=self.of_tasks.replace("`", ""),
            rows=as_text_cells(self.rows),
            judged=verdict_cells(verdicts) if verdicts else [],
            compared=compared_cells(self.rows, self.outcomes),
            alternatives=self.alternatives(verdicts),
            axes=axes_cells(self.axes),
            words=WORDS,
            equal_cost=EQUAL_COST.replace("`", ""),
            continued=CONTINUED,
            captions={"barrier": CAPTIONS[LINE], "blocks": CAPTIONS[BLOCKS], "maps": CAPTIONS[MAPS]},
            drawn={
                section: [plots.svg(panel, f"{section}-{number}") for number, panel in enumerate(panels)]
                for section, panels in sections.items()
            },
        )

    def alternatives(self, found: Sequence[Verdict]) -> list[list[str]]:
        """What a user could have instead for the time of the fusion, as a table of text, header first; empty where that
        was not measured.

        Args:
            found: the verdicts.
        """
        if not (found and found[0].stage == "one-shot" and any(row.steps is not None for row in self.rows)):
            return []
        verdict = found[0]
        parent = f"parent {verdict.parent}"
        best = self.outcomes[parent, "one-shot"]
        against = {
            name: verdict.summary(outcome.better(best, verdict.metric))
            for (name, stage), outcome in self.outcomes.items()
            if stage == "one-shot" and name != parent
        }
        return equal_cost_cells(self.rows, parent, against)

    def barrier_cells(self) -> list[list[str]]:
        """The loss barriers as a table of text, header first."""
        return [
            ["", "loss barrier", "accuracy drop"],
            *(
                [name, readable("loss", curve.barrier), readable("accuracy", curve.accuracy_barrier)]
                for name, curve in self.barrier.items()
            ),
        ]

    def config_as_yaml(self) -> str:
        """The configuration as it is shown."""
        text: str = yaml.safe_dump(_plain(self.config), sort_keys=False, allow_unicode=True)
        return text

    def save(self, folder: str | Path) -> None:
        """Writes report.html, report.md, the PNGs, and what `load` reads: report.json, samples.safetensors and
        pictures.safetensors. No file is ever half written.
        """
        folder = Path(folder)
        with beside(folder) as new:
            pictures = self._pictures()
            for name, panels in pictures.items():
                plots.png(panels, new / name)
            (new / "report.md").write_text(self.markdown(tuple(pictures)), encoding="utf-8")
            (new / "report.html").write_text(self.html(), encoding="utf-8")
            if self.outcomes or self.scores:
                save_outcomes(new / SAMPLES, self._samples())
            if drawn := self._drawn():
                save_file(drawn, new / PICTURES)
            (new / "report.json").write_text(json.dumps(self._as_dict(), indent=2) + "\n", encoding="utf-8")
            for path in sorted(new.iterdir()):
                put_in_place(path, folder / path.name)

    @classmethod
    def load(cls, folder: str | Path) -> "Report":
        """Reads what `save` wrote to a folder.

        Raises:
            FusionError: there is no report, or a file of it is damaged.
        """
        path = Path(folder) / "report.json"
        if not path.is_file():
            raise FusionError(f"no report at '{path}'; fuse.py writes one next to the fused model")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            rows = [Row(**row) for row in data["rows"]]
            barrier = {name: Curve.read(values) for name, values in data["barrier"].items()}
            continued = {key: data[key] for key in ("notes", "prompt", "continuations") if key in data}
            pictures = load_tensors(path.with_name(PICTURES))
            axes = {
                name: MatchedAxis(**values, picture=pictures.get(f"maps/{name}/shares"))
                for name, values in data.get("axes", {}).items()
            }
            blocks: dict[str, tuple[Tensor, Sequence[int]]] = {
                name: (pictures[key], list(way))
                for name, way in data.get("blocks", {}).items()
                if (key := f"blocks/{name}") in pictures
            }
            report = cls(rows, data["config"], barrier, axes=axes, blocks=blocks, **continued)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FusionError(f"'{path}' is not a fusion report ({reason(error)}); run fuse.py again") from error
        report._read_samples(load_outcomes(path.with_name(SAMPLES)))
        return report

    def _read_samples(self, samples: Mapping[str, Outcomes]) -> None:
        """Takes what models did, by the names that `_samples` gives them."""
        for row in self.rows:
            key, names = (row.name, row.stage), row.metrics or row.tasks or ()
            if (whole := f"{row.stage}/{row.name}") in samples:
                self.outcomes[key] = samples[whole]
            of_tasks = {name: samples[of] for name in names if (of := _of_task(name, row)) in samples}
            if row.metrics:
                self.scores[key] = {name: Scores(row.metrics[name], one.values) for name, one in of_tasks.items()}
            elif of_tasks:
                self.tasks[key] = of_tasks

    def _samples(self) -> dict[str, Outcomes]:
        """What models did, by the names that `load` looks for."""
        tasks = {
            _of_task(task, row): outcomes
            for row in self.rows
            for task, outcomes in self.tasks.get((row.name, row.stage), {}).items()
        }
        scores = {
            _of_task(task, row): Outcomes(found.values)
            for row in self.rows
            for task, found in self.scores.get((row.name, row.stage), {}).items()
        }
        return tasks | scores | {f"{stage}/{name}": outcome for (name, stage), outcome in self.outcomes.items()}

    def _pictures(self) -> dict[str, list[plots.Panel]]:
        """The pictures that have something to show, by the names of their files."""
        every = {BARS: plots.bars(self.rows), LINE: plots.curves(self.barrier), MAPS: plots.maps(self.axes),
                 BLOCKS: plots.blocks(self.blocks)}  # fmt: skip
        return {name: panels for name, panels in every.items() if panels}

    def _drawn(self) -> dict[str, Tensor]:
        """What pictures are made of, by the names that `load` looks for."""
        drawn = {f"blocks/{name}": alike.float().contiguous() for name, (alike, _) in self.blocks.items()}
        shares = {f"maps/{name}/shares": axis.picture for name, axis in self.axes.items()}
        return drawn | {name: picture.contiguous() for name, picture in shares.items() if picture is not None}

    def _as_dict(self) -> dict[str, Any]:
        judged: Sequence[Verdict | OnTask] = self.verdicts or self.on_tasks
        continued = {"prompt": self.prompt, "continuations": self.continuations} if self.continuations else {}
        return {
            "rows": [row.as_dict() for row in self.rows],
            "config": _plain(self.config),
            "barrier": {name: curve.as_dict() for name, curve in self.barrier.items()},
            **({"verdict": [verdict.as_dict() for verdict in judged]} if judged else {}),
            **({"kept": [each.as_dict() for each in self.kept]} if self.kept else {}),
            **({"axes": {name: axis.as_dict() for name, axis in self.axes.items()}} if self.axes else {}),
            **({"blocks": {name: list(way) for name, (_, way) in self.blocks.items()}} if self.blocks else {}),
            **({"notes": self.notes} if self.notes else {}),
            **continued,
        }


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in JSON's types, tuples as lists and enumerations as text; paths as others may see them."""
    plain: dict[str, Any] = json.loads(json.dumps(public_settings(config), default=str))
    return plain


def _of_task(task: str, row: Row) -> str:
    return f"tasks/{task}/{row.stage}/{row.name}"


def _embedded(name: str, figures: tuple[str, ...]) -> list[str]:
    return [f"![{Path(name).stem}]({name})", CAPTIONS[name]] if name in figures else []
