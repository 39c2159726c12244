"""What a report says in words, and its tables, a header and lines of cells, as plain text and Markdown."""

import re
from collections.abc import Sequence

from fusionpl.evaluation.scores import ACCURACY, AGREEMENT, PERPLEXITY

WORDS = ("", "name", "stage", "needs", "text", "word")  # columns that hold words, not figures
IN_EQUAL_TIME = "`distilled` and `trained-on` start from the best parent and had the seconds of the fused model."
OF_COST = "FLOPs: for one sample, in brackets how many times the best parent's."
OF_SECONDS = "Seconds: wall time behind the parents' training"
OF_TASKS = {
    ACCURACY: "`on NAME`: accuracy on that parent's own test data when only the classes that it knows may be answered. "
    "The other figures are over the classes of all; each parent's test data count alike.",
    PERPLEXITY: "`perplexity on NAME`: on that parent's own test text. The other figures are over the text of all, of "
    "which each parent's counts alike. What is kept of a parent is its perplexity over the fused model's.",
    AGREEMENT: "`agreement on NAME`: on that parent's own test data, the share of the nearest neighbours that are "
    "those by that parent, or without a fusion by all models together. `agreement` is the mean of these.",
}
OF_HEADS = (
    "Each head is measured on its own parent's test data. `fused`, and a parent's trunk with all heads fitted, answer "
    "for all tasks in one pass."
)
# Words of reports and names of rows, in the order in which they are explained; those of README's glossary as there.
GLOSSARY = {
    "fused": "the model that the fusion made; in brackets another preset of it",
    "ensemble": "all parents are run, and their predictions averaged",
    "logits side by side": "all parents are run, each for its own classes, and the surest one wins",
    "head-fitted": "a parent as it is, its last layer alone fitted to what all parents predict",
    "all trunks": "all parents are run below one last layer that is fitted to all",
    "vanilla": "the plain average of the parents' weights, unit by unit as they stand",
    "aligned average": "the average of the parents' weights once their units are matched",
    "refitted": "the fused model before it was taught further",
    "distilled": "the best parent, taught to predict as the ensemble does, without labels",
    "trained-on": "the best parent, trained on labels",
    "anchor": "the parent whose architecture and order of units the fused model has, the first by default",
    "one stream": "a residual stream for all parents",
    "refit": "each layer fitted to what the parents put out there: least squares, no labels, no gradients",
    "owner": "the parent whose data a sample is of, where each has data of its own",
    "verdict": "the fused model beside the best that its user has for nothing, with a standard error",
    "share of the gain": "how much of the way from the best parent to the ensemble a fused model goes",
    "family": "a YAML file that says where an architecture's units are",
    "loss barrier": "how far the loss rises on the straight way between the weights of two models",
}
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


def explained(text: str) -> list[tuple[str, str]]:
    """The words of the glossary that a text uses, with what they mean."""
    text = text.lower()
    return [(word, meaning) for word, meaning in GLOSSARY.items() if re.search(rf"\b{re.escape(word)}\b", text)]
