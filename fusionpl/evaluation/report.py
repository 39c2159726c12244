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
from fusionpl.evaluation.on_tasks import OnTask, in_sentences, on_tasks, outcome_of, samples_in_words, task_cells
from fusionpl.evaluation.outcomes import Outcomes, load_outcomes, load_tensors, save_outcomes
from fusionpl.evaluation.plots import BARS, BLOCKS, CAPTIONS, LINE, MAPS
from fusionpl.evaluation.rows import (
    HEAD_FITTED,
    MODEL,
    PARENT,
    Row,
    Stage,
    as_table,
    as_text_cells,
    baseline,
    best_parent,
    needed,
    readable,
)
from fusionpl.evaluation.scores import Scores
from fusionpl.evaluation.steps import Step
from fusionpl.evaluation.text import (
    CONTINUED,
    IN_EQUAL_TIME,
    OF_COST,
    OF_HEADS,
    OF_SECONDS,
    OF_TASKS,
    WORDS,
    explained,
    markdown_table,
    quoted,
    text_table,
)
from fusionpl.evaluation.verdict import Outcome, Verdict, beside_best, verdicts
from fusionpl.files import beside, put_in_place
from fusionpl.paths import public_settings

CHANGED = "What is not as in the preset:"
UNCHANGED = "All is as in the preset."
EVERY_OPTION = "all options"
SAMPLES, PICTURES = "samples.safetensors", "pictures.safetensors"


@dataclass
class Report:
    """Everything a fusion measured; `save` writes it, `load` reads it back to add the finetuned rows.

    Attributes:
        rows: one a model, in the order they were added.
        config: the configuration that was run, which is folded away.
        changed: what of it is not as in the preset, which is shown; None where nobody knows.
        steps: what to do next, the best first.
        barrier: interpolation curves by name, "vanilla" and "aligned".
        notes: what a reader should know, a line each.
        axes: how the units of a parent were matched, axis by axis; some with a picture.
        blocks: for parents of another depth, what `plots.blocks` draws.
        prompt: what language models went on with.
        continuations: how they did, by the name of the row.
        outcomes: (name, stage) of a row -> what it did on each test sample; the verdict is made of them.
        tasks: (name, stage) of a row -> for each parent with data of its own, what it did on them, see `Row.tasks`.
            Where heads are kept apart there are no outcomes over all samples.
    """

    rows: list[Row] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    barrier: dict[str, Curve] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    axes: dict[str, MatchedAxis] = field(default_factory=dict)
    blocks: dict[str, tuple[Tensor, Sequence[int]]] = field(default_factory=dict)
    prompt: str = ""
    continuations: dict[str, str] = field(default_factory=dict)
    outcomes: dict[tuple[str, Stage], Outcomes] = field(default_factory=dict)
    tasks: dict[tuple[str, Stage], Mapping[str, Scores]] = field(default_factory=dict)

    def add(self, row: Row, outcomes: Outcomes | None = None, tasks: Mapping[str, Scores] | None = None) -> None:
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

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdict on the fused model, before finetuning and after it; see `fusionpl.evaluation.verdict`."""
        return verdicts(self.rows, self.outcomes)

    @property
    def kept(self) -> list[Kept]:
        """What the fused model keeps of each parent that has data of its own."""
        return kept(self.rows, self.tasks)

    @property
    def on_tasks(self) -> list[OnTask]:
        """The fused network beside others on the task of each parent, where heads are kept apart."""
        return [] if self.outcomes else on_tasks(self.rows, self.tasks)

    def outcome(self, stage: Stage) -> Outcome | None:
        """Whether the fused model won, was level or lost beside the best that its user has for nothing; None where that
        was not measured."""
        if judged := [verdict.outcome for verdict in self.verdicts if verdict.stage == stage]:
            return judged[0]
        return outcome_of(self.on_tasks, stage)

    @property
    def best(self) -> str | None:
        """The best parent's name; None where none was measured."""
        chosen = best_parent(self.rows)
        return None if chosen is None else chosen[0].name.removeprefix(PARENT)

    @property
    def head_fitted(self) -> bool:
        """Whether a parent with its head alone fitted is what the fused model is judged beside."""
        held = baseline(self.rows)
        fitted = any(row.name.startswith(HEAD_FITTED) for row in self.rows)
        return fitted if self.tasks and not self.outcomes else held is not None and held.name.startswith(HEAD_FITTED)

    def rows_as_table(self) -> tuple[list[str], list[list[Any]]]:
        """Column names and raw values (None where not measured), one-shot rows first; for `wandb.Table`."""
        return as_table(self.rows)

    def table(self) -> str:
        """The one table as aligned plain text with what its columns mean, the loss barriers, and last the verdict."""
        cells = self._cells()
        finetuned = "stage" in cells[0]
        parts = [text_table(cells, left=1 + finetuned), "\n".join(self._legend())]
        if self.barrier:
            values = [f"{name} {readable('loss', curve.barrier)}" for name, curve in self.barrier.items()]
            parts.append(f"loss barrier: {', '.join(values)}")
        if judged := self.on_tasks:
            parts.append(text_table(task_cells(judged), left=2))
        parts.append("\n".join([*self._judgements(), *self._details()]))
        return "\n\n".join(part for part in parts if part)

    def markdown(self, figures: tuple[str, ...] = (), *, steps: bool = True) -> str:
        """The report as Markdown: the verdict, what to do next, one table, and what explains it.

        Args:
            figures: which of the pictures lie next to the file and are embedded.
            steps: whether to say what to do next, which names folders of this machine.
        """
        parts = [f"# {self.title}"]
        if judgements := self._judgements():
            parts += ["## Verdict", *(f"**{sentence}**" for sentence in judgements)]
            parts += ["\n".join(f"- {line}" for line in details)] if (details := self._details()) else []
        if steps and self.steps:
            commands = "\n".join(f"# {step.why}\n{step.command}".strip() for step in self.steps)
            parts += ["## Next", f"```bash\n{commands}\n```"]
        if self.rows:
            legend = "\n".join(f"- {line}" for line in self._legend())
            parts += ["## Models", markdown_table(self._cells()), *([legend] if legend else [])]
        if judged := self.on_tasks:
            parts += [markdown_table(task_cells(judged)), samples_in_words(judged)]
        parts += _embedded(BARS, figures)
        if self.notes:
            parts += ["## Notes", "\n".join(f"- {note}" for note in self.notes)]
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
        if words := self.words:
            parts += ["## Words", "\n".join(f"- **{word}**: {meaning}" for word, meaning in words)]
        if self.config:
            parts += ["## Configuration", CHANGED if self.changed else UNCHANGED]
            parts += [f"```yaml\n{as_yaml(self.changed)}```"] if self.changed else []
            parts += [f"<details><summary>{EVERY_OPTION}</summary>\n\n```yaml\n{as_yaml(self.config)}```\n\n</details>"]
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """The report as one page, with all that it shows in it."""
        sections = {"cost": plots.cost(self.rows), "barrier": plots.curves(self.barrier),
                    "blocks": plots.blocks(self.blocks), "maps": plots.maps(self.axes)}  # fmt: skip
        on_tasks = self.on_tasks
        return page(
            report=self,
            judgements=self._judgements(),
            details=self._details(),
            on_tasks=task_cells(on_tasks) if on_tasks else [],
            samples=samples_in_words(on_tasks),
            rows=self._cells(),
            legend=[line.replace("`", "") for line in self._legend()],
            axes=axes_cells(self.axes),
            words=WORDS,
            continued=CONTINUED,
            changed=as_yaml(self.changed) if self.changed else "",
            every=as_yaml(self.config),
            above=CHANGED if self.changed else UNCHANGED,
            every_option=EVERY_OPTION,
            captions={"barrier": CAPTIONS[LINE], "blocks": CAPTIONS[BLOCKS], "maps": CAPTIONS[MAPS]},
            drawn={
                section: [plots.svg(panel, f"{section}-{number}") for number, panel in enumerate(panels)]
                for section, panels in sections.items()
            },
        )

    @property
    def title(self) -> str:
        """What the report is of."""
        return "Evaluation" if best_parent(self.rows, MODEL) else "Fusion report"

    @property
    def words(self) -> list[tuple[str, str]]:
        """The words of the glossary that the report uses, with what they mean."""
        names = (row.name for row in self.rows)
        shown = [*self._judgements(), *self._details(), *self._legend(), *names, *self.notes, as_yaml(self.changed)]
        shown += ["verdict"] * bool(self._judgements()) + ["loss barrier"] * bool(self.barrier)
        return explained("\n".join(shown))

    def _cells(self) -> list[list[str]]:
        """The one table: what is better than what, and what it costs."""
        found = self.verdicts
        of = "to the best parent" if found else "to the best model"
        return as_text_cells(self.rows, beside_best(self.rows, self.outcomes, found), of)

    def _judgements(self) -> list[str]:
        """The verdict, a sentence for each stage, of heads that are kept apart for each row beside it."""
        if best := best_parent(self.rows, MODEL):
            return [f"{best[0].name} is the best, by {best[1]}"]
        return [*(verdict.words for verdict in self.verdicts), *in_sentences(self.rows, self.on_tasks)]

    def _details(self) -> list[str]:
        """What stands behind the verdict: the share of the gain, what is kept of parents with data of their own."""
        shares = [verdict.share_in_words for verdict in self.verdicts]
        return [*filter(None, shares), *(each.words for each in self.kept)]

    def _legend(self) -> list[str]:
        """What the columns of the table mean, a line each."""
        lines = []
        if found := self.verdicts:
            first, last = found[0], found[-1]
            alike = f", after finetuning beside {last.row} finetuned alike" if last.stage == "finetuned" else ""
            lines.append(
                f"`to the best parent`: beside {first.row}, the best by {first.chosen}{alike}, on the same "
                f"{last.difference.samples:,} test samples; ± is one standard error, and `level` may be chance."
            )
        elif best := best_parent(self.rows, MODEL):
            lines.append(
                f"`to the best model`: beside {best[0].name}; ± is one standard error, and `level` may be chance."
            )
        lines += [self._of_tasks] if self._of_tasks else []
        if best_parent(self.rows) and any(row.flops for row in self.rows):
            lines.append(OF_COST)
        if needs := needed(self.rows):
            lines.append(f"{OF_SECONDS}, on unlabelled data." if needs == {"unlabelled data"} else f"{OF_SECONDS}.")
        lines += [IN_EQUAL_TIME] if any(row.steps is not None for row in self.rows) else []
        return lines

    @property
    def _of_tasks(self) -> str:
        """What the columns of tasks are, in words; empty where there are none."""
        metrics = [scores.metric for tasks in self.tasks.values() for scores in tasks.values()]
        return "" if not metrics else OF_TASKS[metrics[0]] if self.outcomes else OF_HEADS

    def barrier_cells(self) -> list[list[str]]:
        """The loss barriers as a table of text, header first."""
        return [
            ["", "loss barrier", "accuracy drop"],
            *(
                [name, readable("loss", curve.barrier), readable("accuracy", curve.accuracy_barrier)]
                for name, curve in self.barrier.items()
            ),
        ]

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
            if self.outcomes or self.tasks:
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
            steps = [Step.read(step) for step in data.get("next", [])]
            report = cls(
                rows, data["config"], data.get("changed", {}), steps, barrier, axes=axes, blocks=blocks, **continued
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FusionError(f"'{path}' is not a fusion report ({reason(error)}); run fuse.py again") from error
        report._read_samples(load_outcomes(path.with_name(SAMPLES)))
        return report

    def _read_samples(self, samples: Mapping[str, Outcomes]) -> None:
        """Takes what models did, by the names that `_samples` gives them."""
        for row in self.rows:
            key = row.name, row.stage
            if (whole := f"{row.stage}/{row.name}") in samples:
                self.outcomes[key] = samples[whole]
            named = {task: (metric, _of_task(task, row)) for task, metric in (row.metrics or {}).items()}
            tasks = {task: Scores(metric, samples[of].values) for task, (metric, of) in named.items() if of in samples}
            if tasks:
                self.tasks[key] = tasks

    def _samples(self) -> dict[str, Outcomes]:
        """What models did, by the names that `load` looks for."""
        tasks = {
            _of_task(task, row): Outcomes(scores.values)
            for row in self.rows
            for task, scores in self.tasks.get((row.name, row.stage), {}).items()
        }
        return tasks | {f"{stage}/{name}": outcome for (name, stage), outcome in self.outcomes.items()}

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
            **({"changed": _plain(self.changed)} if self.changed else {}),
            **({"next": [step.as_dict() for step in self.steps]} if self.steps else {}),
            "barrier": {name: curve.as_dict() for name, curve in self.barrier.items()},
            **({"verdict": [verdict.as_dict() for verdict in judged]} if judged else {}),
            **({"kept": [each.as_dict() for each in self.kept]} if self.kept else {}),
            **({"axes": {name: axis.as_dict() for name, axis in self.axes.items()}} if self.axes else {}),
            **({"blocks": {name: list(way) for name, (_, way) in self.blocks.items()}} if self.blocks else {}),
            **({"notes": self.notes} if self.notes else {}),
            **continued,
        }


def as_yaml(config: Mapping[str, Any]) -> str:
    """A configuration as it is shown."""
    text: str = yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)
    return text


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in JSON's types, tuples as lists and enumerations as text; paths as others may see them."""
    plain: dict[str, Any] = json.loads(json.dumps(public_settings(config), default=str))
    return plain


def _of_task(task: str, row: Row) -> str:
    return f"tasks/{task}/{row.stage}/{row.name}"


def _embedded(name: str, figures: tuple[str, ...]) -> list[str]:
    return [f"![{Path(name).stem}]({name})", CAPTIONS[name]] if name in figures else []
