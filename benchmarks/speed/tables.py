"""The tables: which fusions each measures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import DEFAULT, DEVICE, JOINT, PAPER, TRANSPORT, Figures
from benchmarks.paper.cells import Cell
from benchmarks.paper.choices import ALIGNMENTS
from benchmarks.speed.cell import Request, in_fresh_process, measured, prepare
from benchmarks.speed.pairs import Shape

REFIT = "transport + refit"
SETTINGS: dict[str, tuple[Path, Mapping[str, Any]]] = {
    "paper": (PAPER, {}),
    REFIT: (TRANSPORT, {}),
    "rotation": (PAPER, {**ALIGNMENTS["rotation"], "refit.method": "ridge"}),
    "one stream": (JOINT, {}),
}
AS_CALLED = "default"
PLAIN = "plain recipe"


def vit(width: int, depth: int) -> Shape:
    return Shape("vit", width, depth, heads=width // 64, mlp=4 * width)


# What conf/train/vit-digits.yaml trains, with other weights.
DIGITS = Shape("vit", 128, 6, heads=4, mlp=256, channels=1)
BERT_BASE = Shape("bert", 768, 12, heads=12, mlp=3072)
BERT_1B = Shape("bert", 2048, 20, heads=16, mlp=8192)


@dataclass(frozen=True)
class Sizes:
    """The sizes of every table.

    Attributes:
        ratio: model -> shape and samples.
        default: likewise, for the setting that a user gets who asks for none.
        depth: shapes of one width.
        depth_samples: samples for them.
        samples: model, and the numbers of samples that are tried.
        plain: model -> shape and samples.
        large: parents in memory, and in files; with samples.
        memory: GiB that kept activations may take in the tables of memory.
        threads: numbers of threads of the first table; of a GPU's host, one will do.
        fresh: each cell in a process of its own.
    """

    ratio: Mapping[str, tuple[Shape, int]]
    default: Sequence[tuple[str, Shape, int]]
    depth: Sequence[Shape]
    depth_samples: int
    samples: tuple[str, Shape, Sequence[int]]
    plain: Mapping[str, tuple[Shape, int]]
    large: tuple[tuple[str, Shape, int], tuple[str, Shape, int]]
    memory: Mapping[str, float]
    threads: Sequence[int] = (1, 2) if DEVICE == "cpu" else (1,)
    fresh: bool = True


FULL = Sizes(
    ratio={
        "ViT 128x6": (DIGITS, 200),
        **{f"ViT {width}x{depth}": (vit(width, depth), 128) for width, depth in ((384, 12), (768, 12), (1024, 24))},
        "BERT-base": (BERT_BASE, 128),
    },
    default=(
        ("ViT 128x6", DIGITS, 200),
        ("ViT 128x6", DIGITS, 2_000),
        ("ViT 384x12", vit(384, 12), 128),
        ("ViT 768x12", vit(768, 12), 512),
    ),
    depth=[vit(192, depth) for depth in (6, 12, 24)],
    depth_samples=128,
    samples=("ViT 128x6", DIGITS, (200, 2_000, 20_000)),
    plain={"ViT 128x6": (DIGITS, 200), "ViT 384x12": (vit(384, 12), 128)},
    large=(("ViT-L (1024x24)", vit(1024, 24), 128), ("BERT, 1.07 B parameters, bfloat16 files", BERT_1B, 32)),
    memory={"samples": 0.25, "large": 1.0},
)
_TINY = Shape("vit", 32, 2, heads=2, mlp=48, channels=1)
_TINY_BERT = Shape("bert", 32, 2, heads=2, mlp=48, vocabulary=90)
QUICK = Sizes(
    ratio={"ViT 32x2": (_TINY, 8), "BERT 32x2": (_TINY_BERT, 8)},
    default=(("ViT 32x2", _TINY, 8),),
    depth=[Shape("vit", 32, depth, heads=2, mlp=48) for depth in (1, 2)],
    depth_samples=8,
    samples=("ViT 32x2", _TINY, (8, 16)),
    plain={"ViT 32x2": (_TINY, 8)},
    large=(("ViT 32x2", _TINY, 8), ("BERT 32x2, bfloat16 files", _TINY_BERT, 8)),
    memory={"samples": 0.0, "large": 0.0},
    threads=(1,),
    fresh=False,
)


@dataclass(frozen=True)
class Entry:
    """A line of a table.

    Attributes:
        model, setting: their names.
        request: what is measured.
        fresh: in a process of its own.
    """

    model: str
    setting: str
    request: Request
    fresh: bool

    @property
    def cell(self) -> Cell:
        """What is measured once and kept."""
        threads, samples = self.request.threads, self.request.samples
        repeat = f"{self.setting}, {samples} samples, {threads} thread{'s' if threads > 1 else ''}"
        return Cell(self.model, repeat, partial(self._measure))

    def _measure(self) -> Figures:
        prepare(self.request)
        return (in_fresh_process if self.fresh else measured)(self.request)


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: what it shows.
        entries: its lines.
        columns: of the figures that `benchmarks.speed.report` knows.
    """

    title: str
    entries: Sequence[Entry]
    columns: Sequence[str]


def _entry(
    sizes: Sizes, model: str, shape: Shape, setting: str, samples: int, threads: int, memory: float | None = None
) -> Entry:
    preset, changes = (DEFAULT, {}) if setting == AS_CALLED else SETTINGS.get(setting, (None, {}))
    if shape.kind == "bert" and setting == "paper":
        changes = {**changes, "calibration.tokens": "all"}  # there is no window over text
    if memory is not None:
        changes = {**changes, "calibration.memory": memory}
    return Entry(
        model, setting, Request(shape, samples, threads, str(preset) if preset else None, changes), sizes.fresh
    )


def ratio(sizes: Sizes, runs: Path) -> Table:
    """Every setting on every shape, on one thread and on two."""
    entries = [
        _entry(sizes, model, shape, setting, samples, threads)
        for model, (shape, samples) in sizes.ratio.items()
        for setting in SETTINGS
        if setting != "rotation" or shape.kind == "vit"  # norms behind the addition do not commute with rotations
        for threads in sizes.threads
    ]
    return Table(
        "The whole fusion in multiples of both parents' forward passes over the same samples, and the most memory that "
        "it needed beyond theirs, the fused model included.",
        entries,
        ("forward", "seconds", "ratio", "extra"),
    )


def default(sizes: Sizes, runs: Path) -> Table:
    """What a user gets who asks for nothing, trials of whose units to take included."""
    entries = [
        _entry(sizes, model, shape, setting, samples, 1)
        for model, shape, samples in sizes.default
        for setting in (AS_CALLED, "paper")
    ]
    return Table(
        "`conf/fuse/default.yaml`, as a user calls it, in multiples of both parents' forward passes. The parents "
        "disagree so that both ways to take units are tried, where there are samples enough for that.",
        entries,
        ("forward", "seconds", "ratio", "extra"),
    )


def depth(sizes: Sizes, runs: Path) -> Table:
    """One width, more and more blocks."""
    entries = [
        _entry(sizes, f"ViT {shape.width}x{shape.depth}", shape, setting, sizes.depth_samples, 1)
        for setting in SETTINGS
        for shape in sizes.depth
    ]
    return Table("The cost of a fusion by depth, at one width.", entries, ("forward", "seconds", "ratio", "extra"))


def samples(sizes: Sizes, runs: Path) -> Table:
    """One shape, more and more samples."""
    model, shape, numbers = sizes.samples
    limit = sizes.memory["samples"]
    entries = [
        _entry(sizes, model, shape, setting, number, 2, limit) for setting in ("paper", REFIT) for number in numbers
    ]
    return Table(
        f"Memory by number of samples, with `calibration.memory` at {limit:g} GiB: what exceeds it goes to a file.",
        entries,
        ("forward", "seconds", "ratio", "extra"),
    )


def plain(sizes: Sizes, runs: Path) -> Table:
    """The engine beside the published recipe as its released code goes about it."""
    entries = [
        _entry(sizes, model, shape, setting, number, 1)
        for model, (shape, number) in sizes.plain.items()
        for setting in (PLAIN, "paper")
    ]
    return Table(
        "The paper's setting beside the same recipe done plainly (`benchmarks/speed/plain.py`): all activations "
        "stored, one sample at a time, pairwise distances, one solve an axis.",
        entries,
        ("seconds", "extra", "faster", "share"),
    )


def large(sizes: Sizes, runs: Path) -> Table:
    """What one machine has to hold for large models."""
    limit = sizes.memory["large"]
    (model, shape, number), (filed, text, few) = sizes.large
    preset, changes = SETTINGS[REFIT]
    folders = tuple(str((runs / "parents" / f"{filed}-{seed}").absolute()) for seed in (1, 2))
    request = Request(text, few, 1, str(preset), {**changes, "calibration.memory": limit}, folders)
    entries = [_entry(sizes, model, shape, REFIT, number, 1, limit), Entry(filed, REFIT, request, sizes.fresh)]
    return Table(
        f"Large parents, `calibration.memory` at {limit:g} GiB: all the memory of the process at its peak, parents in "
        "memory included. Those in files are read from shards block by block, and the fused model is written so.",
        entries,
        ("forward", "seconds", "ratio", "most"),
    )


TABLES: dict[str, Callable[[Sizes, Path], Table]] = {
    "ratio": ratio,
    "default": default,
    "depth": depth,
    "samples": samples,
    "plain": plain,
    "large": large,
}
