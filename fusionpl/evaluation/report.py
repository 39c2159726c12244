"""The report of a fusion: rows, configuration and loss barriers as JSON, Markdown and pictures."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from fusionpl.errors import FusionError, reason
from fusionpl.evaluation import plots
from fusionpl.evaluation.barrier import Curve
from fusionpl.evaluation.outcomes import Outcomes, load_outcomes, save_outcomes
from fusionpl.evaluation.rows import (
    MODEL,
    Row,
    Stage,
    as_table,
    as_text_cells,
    best_parent,
    equal_cost_cells,
    known,
    readable,
)
from fusionpl.evaluation.verdict import Verdict, compared_cells, verdict_cells, verdicts
from fusionpl.models import beside

SAMPLES = "samples.safetensors"
BARS, LINE, MAPS, BLOCKS = "bars.png", "interpolation.png", "transport-maps.png", "blocks.png"
CAPTIONS = {
    BARS: "All models on the same test data. Hatched bars: after finetuning.",
    LINE: "On the straight line between parent A and anchor B: A as trained (vanilla), and A aligned to B.",
    MAPS: "Of which parent units each anchor unit is made, and of how many (partners). "
    "A sharp diagonal is a one-to-one matching.",
    BLOCKS: "Streams of parents of another depth beside the anchor's, and the path along which blocks were matched.",
}
EQUAL_COST = (
    "What its parents' owner could have instead. `distilled` and `trained-on` start from the best parent and had the "
    "seconds of the fused model. Seconds are wall time behind the parents' training."
)


@dataclass
class Report:
    """Everything a fusion measured; `save` writes it, `load` reads it back to add the finetuned rows.

    Attributes:
        rows: one a model, in the order they were added.
        config: the configuration that was run (shown as YAML).
        barrier: interpolation curves by name, "vanilla" and "aligned".
        notes: what a reader should know, a line each.
        maps: transport maps to draw, axis name -> [n_parent, n_anchor]; `save` draws them.
        blocks: for parents of another depth, what `plots.blocks_figure` draws; `save` draws it.
        prompt: what language models went on with.
        continuations: how they did, by the name of the row.
        outcomes: (name, stage) of a row -> what it did on each test sample; the verdict is made of them.
    """

    rows: list[Row] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    barrier: dict[str, Curve] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    maps: dict[str, Tensor] = field(default_factory=dict)
    blocks: dict[str, tuple[Tensor, Sequence[int]]] = field(default_factory=dict)
    prompt: str = ""
    continuations: dict[str, str] = field(default_factory=dict)
    outcomes: dict[tuple[str, Stage], Outcomes] = field(default_factory=dict)

    def add(self, row: Row, outcomes: Outcomes | None = None) -> None:
        """Adds a row; one of the same name and stage is replaced where it stands.

        Args:
            row: what a model measured.
            outcomes: what it did on each test sample.
        """
        self.outcomes.pop((row.name, row.stage), None)
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

    def rows_as_table(self) -> tuple[list[str], list[list[Any]]]:
        """Column names and raw values (None where not measured), one-shot rows first; for `wandb.Table`."""
        return as_table(self.rows)

    def table(self) -> str:
        """The rows as aligned plain text, the loss barriers, what could be had at equal cost, and last the verdict."""
        parts = [_text_table(as_text_cells(self.rows), left=2)]
        if self.barrier:
            values = [f"{name} {readable('loss', curve.barrier)}" for name, curve in self.barrier.items()]
            parts.append(f"loss barrier: {', '.join(values)}")
        found = self.verdicts
        if alternatives := self._alternatives(found):
            parts.append(_text_table(alternatives, left=2))
        if found:
            parts += [_text_table(verdict_cells(found), left=1), "\n".join(one.words for one in found)]
        if compared := compared_cells(self.rows, self.outcomes):
            parts.append(_text_table(compared, left=1))
        return "\n\n".join(parts)

    def markdown(self, figures: tuple[str, ...] = ()) -> str:
        """The report as Markdown, with the configuration as YAML.

        Args:
            figures: which of the pictures lie next to the file and are embedded.
        """
        header, *body = as_text_cells(self.rows)
        title = "# Evaluation" if best_parent(self.rows, MODEL) else "# Fusion report"
        parts = [title, _markdown_table(header, body), *_embedded(BARS, figures)]
        found = self.verdicts
        if found:
            parts += [
                "## Verdict",
                *(f"**{one.words}**" for one in found),
                _markdown_table(*_split(verdict_cells(found))),
            ]
            parts += [f"± is one standard error, from the same {found[-1].difference.samples:,} test samples."]
        if compared := compared_cells(self.rows, self.outcomes):
            parts += ["## Beside the best model", _markdown_table(*_split(compared))]
        if alternatives := self._alternatives(found):
            parts += ["## At equal cost", EQUAL_COST, _markdown_table(*_split(alternatives))]
        if self.notes:
            parts += ["\n".join(f"- {note}" for note in self.notes)]
        if self.barrier:
            barriers = [
                [name, readable("loss", curve.barrier), readable("accuracy", curve.accuracy_barrier)]
                for name, curve in self.barrier.items()
            ]
            parts += ["## Loss barrier", _markdown_table(["", "loss barrier", "accuracy drop"], barriers)]
            parts += _embedded(LINE, figures)
        if BLOCKS in figures:
            parts += ["## Blocks", *_embedded(BLOCKS, figures)]
        if MAPS in figures:
            parts += ["## Transport maps", *_embedded(MAPS, figures)]
        if self.continuations:
            parts += ["## Continuations", "The likeliest token each time, before finetuning. Line ends are drawn as ⏎."]
            parts += [_markdown_table(["", "text"], [["prompt", _quoted(self.prompt)], *self._continued()])]
        if self.config:
            text = yaml.safe_dump(_plain(self.config), sort_keys=False, allow_unicode=True)
            parts += ["## Configuration", f"```yaml\n{text}```"]
        return "\n\n".join(parts) + "\n"

    def _alternatives(self, found: Sequence[Verdict]) -> list[list[str]]:
        """What a user could have instead for the fusion's time; nothing where that was not measured."""
        if not (found and found[0].stage == "one-shot" and any(row.steps is not None for row in self.rows)):
            return []
        verdict = found[0]
        parent = f"parent {verdict.parent}"
        best = self.outcomes[parent, "one-shot"]
        against = {
            name: verdict.told(one.better(best, verdict.metric))
            for (name, stage), one in self.outcomes.items()
            if stage == "one-shot" and name != parent
        }
        return equal_cost_cells(self.rows, parent, against)

    def _continued(self) -> list[list[str]]:
        return [[name, _quoted(text)] for name, text in self.continuations.items()]

    def save(self, folder: str | Path) -> None:
        """Writes report.json, report.md, the PNGs and samples.safetensors; no file is ever half written.

        Pictures of transport maps and blocks that are already there stay when there is nothing to draw, so that a
        report that was loaded keeps them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with beside(folder) as new:
            figures = {BARS: plots.metric_bars(self.rows)} if self.rows else {}
            if self.barrier:
                figures[LINE] = plots.interpolation_figure(self.barrier)
            if self.maps:
                figures[MAPS] = plots.map_figure(self.maps)
            if self.blocks:
                figures[BLOCKS] = plots.blocks_figure(self.blocks)
            for name, figure in figures.items():
                # Without the software's version, the same report gives the same bytes.
                figure.savefig(new / name, dpi=160, metadata={"Software": None})
            there = (*figures, *(name for name in (MAPS, BLOCKS) if (folder / name).exists()))
            (new / "report.md").write_text(self.markdown(there), encoding="utf-8")
            if self.outcomes:
                save_outcomes(new / SAMPLES, {f"{stage}/{name}": one for (name, stage), one in self.outcomes.items()})
            (new / "report.json").write_text(json.dumps(self._as_dict(), indent=2) + "\n", encoding="utf-8")
            for path in sorted(new.iterdir()):
                os.replace(path, folder / path.name)

    @classmethod
    def load(cls, folder: str | Path) -> "Report":
        """Reads `folder`/report.json; `maps` stay empty.

        Raises:
            FusionError: there is no report, or the file is not one.
        """
        path = Path(folder) / "report.json"
        if not path.is_file():
            raise FusionError(f"no report at '{path}'; fuse.py writes one next to the fused model")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            rows = [Row(**row) for row in data["rows"]]
            barrier = {name: _curve(values) for name, values in data["barrier"].items()}
            continued = {key: data[key] for key in ("notes", "prompt", "continuations") if key in data}
            report = cls(rows, data["config"], barrier, **continued)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FusionError(f"'{path}' is not a fusion report ({reason(error)}); run fuse.py again") from error
        samples = load_outcomes(path.with_name(SAMPLES))
        report.outcomes = {
            (row.name, row.stage): samples[key] for row in rows if (key := f"{row.stage}/{row.name}") in samples
        }
        return report

    def _as_dict(self) -> dict[str, Any]:
        barrier = {
            name: {
                "barrier": _number(curve.barrier),
                "accuracy_barrier": _number(curve.accuracy_barrier),
                "lambdas": list(curve.lambdas),
                "accuracy": [_number(value) for value in curve.accuracy],
                "loss": [_number(value) for value in curve.loss],
            }
            for name, curve in self.barrier.items()
        }
        continued = {"prompt": self.prompt, "continuations": self.continuations} if self.continuations else {}
        return {
            "rows": [row.as_dict() for row in self.rows],
            "config": _plain(self.config),
            "barrier": barrier,
            **({"verdict": [one.as_dict() for one in found]} if (found := self.verdicts) else {}),
            **({"notes": self.notes} if self.notes else {}),
            **continued,
        }


def _number(value: float) -> float | None:
    """JSON has no NaN or infinity."""
    return value if known(value) else None


def _curve(values: Mapping[str, Any]) -> Curve:
    """A curve from JSON, where null stands for what was not finite."""
    return Curve(
        *(
            tuple(math.nan if value is None else value for value in values[key])
            for key in ("lambdas", "accuracy", "loss")
        )
    )


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in JSON's types: tuples as lists, paths and enumerations as text."""
    plain: dict[str, Any] = json.loads(json.dumps(config, default=str))
    return plain


def _text_table(cells: list[list[str]], left: int) -> str:
    """Aligned plain text with a line under the header; the first `left` columns are words."""
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    cells = [cells[0], ["-" * width for width in widths], *cells[1:]]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def _split(cells: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    return cells[0], cells[1:]


def _markdown_table(header: list[str], body: list[list[str]]) -> str:
    rule = [":--" if column in ("", "name", "stage", "needs", "text") else "--:" for column in header]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *body))


def _quoted(text: str) -> str:
    """Text as code in a cell of a table, on one line, whatever is in it."""
    text = text.replace("\n", "⏎").replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}"


def _embedded(name: str, figures: tuple[str, ...]) -> list[str]:
    return [f"![{Path(name).stem}]({name})", CAPTIONS[name]] if name in figures else []
