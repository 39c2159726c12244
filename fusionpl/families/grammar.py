"""The axis grammar: what every dimension of a parameter stands for, in one line.

    attn.qkv.weight:  (head q)|(head k)|(head v) <- in

A space separates tensor dimensions, `( )` is a product of axes (the last one names the units, those before it group
them, from the outside in), `|` concatenates along a dimension or, inside a product, within each group; `a*` is an axis
as many times over as the dimension has room for, `1` a dimension of size one. `a <- b` writes a and reads b; `b -> a`
says the same of a transposed weight. Without an arrow everything is written. A number has an empty line.
"""

import re
from dataclasses import dataclass

from fusionpl.errors import FusionError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")


class GrammarError(FusionError):
    """A line of a family file that is not in the axis grammar."""


@dataclass(frozen=True)
class Segment:
    """A run of units along one dimension: the axis that names them, and the axes that group them, outermost first."""

    axis: str
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dim:
    """One tensor dimension, read or written.

    Attributes:
        segments: its segments in order; none for a dimension of size one.
        reads: whether the tensor reads it.
        interleaved: the segments come in turns, group by group: `(head q|k|v)`.
        repeated: there is one segment, as many times over as the dimension has room for: `a*`.
    """

    segments: tuple[Segment, ...]
    reads: bool
    interleaved: bool = False
    repeated: bool = False


def parse(text: str) -> tuple[Dim, ...]:
    """Parses the dimensions of one parameter.

    Raises:
        GrammarError: naming the piece that is wrong.
    """
    if not text:  # a number has no dimensions
        return ()
    if len(re.findall("<-|->", text)) > 1:
        raise GrammarError(f"'{text}': at most one arrow")
    if "->" in text:
        reads, writes = text.split("->")
        return _dims(reads, text, reads=True) + _dims(writes, text, reads=False)
    writes, arrow, reads = text.partition("<-")
    return _dims(writes, text, reads=False) + (_dims(reads, text, reads=True) if arrow else ())


def _dims(side: str, text: str, *, reads: bool) -> tuple[Dim, ...]:
    if side.count("(") != side.count(")"):
        raise GrammarError(f"'{text}': unbalanced parenthesis")
    glued = re.sub(r"\s*\|\s*", "|", side.strip())
    words = re.findall(r"(?:\([^()]*\)|[^()\s])+", glued)
    if not words or "".join(words) != re.sub(r"\s+(?![^(]*\))", "", glued):
        raise GrammarError(f"'{text}': '{side.strip()}' is not a list of dimensions")
    return tuple(_dim(word, text, reads=reads) for word in words)


def _dim(word: str, text: str, *, reads: bool) -> Dim:
    if word == "1":
        return Dim((), reads)
    if word.endswith("*"):
        return Dim((_segment(word[:-1], text),), reads, repeated=True)
    turns = re.fullmatch(r"\((.+) ([^ ]+\|[^ ]+)\)", word)
    if turns:
        segments = (_segment(f"({turns[1]} {name})", text) for name in turns[2].split("|"))
        return Dim(tuple(segments), reads, interleaved=True)
    return Dim(tuple(_segment(piece, text) for piece in word.split("|")), reads)


def _segment(piece: str, text: str) -> Segment:
    names = piece[1:-1].split() if piece.startswith("(") and piece.endswith(")") else [piece]
    for name in names:
        if not _NAME.fullmatch(name):
            raise GrammarError(f"'{text}': '{name}' is not the name of an axis")
    if not 1 <= len(names) <= 3:
        raise GrammarError(f"'{text}': a product has two or three axes, '{piece}' has {len(names)}")
    return Segment(names[-1], tuple(names[:-1]))
