"""What a report says in words, and its tables, a header and lines of cells, as plain text and Markdown."""

import re
from collections.abc import Sequence

WORDS = ("", "name", "stage", "needs", "text")  # columns that hold words, not figures
EQUAL_COST = (
    "What its parents' owner could have instead. `distilled` and `trained-on` start from the best parent and had the "
    "seconds of the fused model. Seconds are wall time behind the parents' training."
)
OF_TASKS = (
    "`on NAME`: accuracy on that parent's own test data when only the classes that it knows may be answered. The other "
    "figures are over the classes of all; each parent's test data count alike."
)
OF_HEADS = (
    "Each head is measured on its own parent's test data. `fused`, and a parent's trunk with all heads fitted, answer "
    "for all tasks in one pass."
)
CONTINUED = "The likeliest token each time, before finetuning. Line ends are drawn as ⏎."


def text_table(cells: Sequence[Sequence[str]], left: int) -> str:
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


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, header first."""
    header, *body = cells
    rule = [":--" if column in WORDS else "--:" for column in header]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *body))


def quoted(text: str) -> str:
    """Text as code in a cell of Markdown, on one line, whatever is in it."""
    text = text.replace("\n", "⏎").replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}"
