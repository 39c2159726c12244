"""The axis grammar: what lines mean, and what the malformed ones are told."""

import pytest

from fusionpl.families.grammar import Dim, GrammarError, Segment, parse


def write(*segments: Segment) -> Dim:
    return Dim(segments, reads=False)


def read(*segments: Segment) -> Dim:
    return Dim(segments, reads=True)


Q, K = Segment("q", ("head",)), Segment("k", ("head",))


@pytest.mark.parametrize(
    ("text", "dims"),
    [
        ("mid", (write(Segment("mid")),)),
        ("ffn <- mid", (write(Segment("ffn")), read(Segment("mid")))),
        ("mid -> ffn", (read(Segment("mid")), write(Segment("ffn")))),
        ("(head q)|(head k) <- in", (write(Q, K), read(Segment("in")))),
        ("(head q) | (head k)<-in", (write(Q, K), read(Segment("in")))),
        ("in -> (head q)|(head k)", (read(Segment("in")), write(Q, K))),
        ("attn <- (head q)", (write(Segment("attn")), read(Q))),
        ("1 positions pos", (write(), write(Segment("positions")), write(Segment("pos")))),
        ("a <- c h w", (write(Segment("a")), read(Segment("c")), read(Segment("h")), read(Segment("w")))),
        ("(q)", (write(Segment("q")),)),
        ("(kv group q) <- in", (write(Segment("q", ("kv", "group"))), read(Segment("in")))),
        ("(head q|k) <- in", (Dim((Q, K), reads=False, interleaved=True), read(Segment("in")))),
        ("(head q | k)", (Dim((Q, K), reads=False, interleaved=True),)),
        ("ffn* <- in", (Dim((Segment("ffn"),), reads=False, repeated=True), read(Segment("in")))),
    ],
)
def test_meaning(text: str, dims: tuple[Dim, ...]) -> None:
    assert parse(text) == dims


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a <- b <- c", "'a <- b <- c': at most one arrow"),
        ("a -> b <- c", "'a -> b <- c': at most one arrow"),
        ("(head q <- in", "'(head q <- in': unbalanced parenthesis"),
        ("ffn <- mid)", "'ffn <- mid)': unbalanced parenthesis"),
        ("3x <- in", "'3x <- in': '3x' is not the name of an axis"),
        ("(head q)|k! <- in", "'(head q)|k! <- in': 'k!' is not the name of an axis"),
        ("(a kv group q) <- in", "'(a kv group q) <- in': a product has two or three axes, '(a kv group q)' has 4"),
        ("* <- in", "'' is not the name of an axis"),
        ("a| <- in", "'' is not the name of an axis"),
        ("2 in", "'2' is not the name of an axis"),
        ("() <- in", "a product has two or three axes, '()' has 0"),
    ],
)
def test_malformed(text: str, message: str) -> None:
    with pytest.raises(GrammarError) as caught:
        parse(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["<-", " ", "a <- ", "(head q)(head k) <- in", ")head q( <- in", "a < - b"])
def test_no_nonsense_passes_in_silence(text: str) -> None:
    with pytest.raises(GrammarError):
        parse(text)


def test_a_number_has_no_dimensions() -> None:
    assert parse("") == ()
