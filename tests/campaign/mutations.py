"""Files that a user may hand in, damaged at random: what reads them succeeds, or says in one line what is wrong."""

import json
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fusionpl.cli import train
from fusionpl.cli.fuse import build_parser
from fusionpl.cli.fusing import arguments, fuse_config
from fusionpl.cli.parsing import with_presets
from fusionpl.cli.tasks import task_of
from fusionpl.datamodules.config import DataConfig, MaskedTextConfig
from fusionpl.datamodules.images import ImageDataModule
from fusionpl.datamodules.text import MaskedTextDataModule
from fusionpl.errors import FusionError
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import Row
from fusionpl.families.family import library, read_family
from fusionpl.fusion.config import load_config
from fusionpl.models.load import load_model
from fusionpl.models.tokenizers import load_tokenizer
from fusionpl.options import settings_in
from fusionpl.presets import CONF
from fusionpl.training.fit import read_checkpoint

LONGEST = 1200  # letters of a line that anyone reads
# What stands in for a number, a word or a bracket.
TOKENS = [
    b"0", b"-1", b"1e400", b"NaN", b"99999999999999999999", b"null", b"true", b'""', b"[]", b"{}", b"[[", b"}", b"\x00",
    b"\xff\xfe", b"\n", b"../../etc/passwd", b"!!python/object/apply:os.system ['true']", b": ", b"- ", b"&a [*a]",
]  # fmt: skip


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to four changes: bytes flipped, cut out, doubled, cut off, or replaced by what a parser stumbles over."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, length = draw.randrange(len(found) + 1), draw.choice((1, 2, 8, 64))
        kind = draw.randrange(6)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del found[at : at + length]
        elif kind == 2:
            found[at:at] = found[at : at + length]
        elif kind == 3:
            del found[at:]
        elif kind == 4:
            found[at : at + draw.choice((0, 1, length))] = draw.choice(TOKENS)
        else:
            found[at:at] = bytes(draw.randrange(256) for _ in range(length))
    return bytes(found)


def header_mutated(data: bytes, draw: random.Random) -> bytes:
    """The header of a safetensors file changed alone, its length right or not: sizes, types and offsets that lie."""
    (length,) = struct.unpack("<Q", data[:8])
    header = mutated(data[8 : 8 + length], draw)
    if draw.random() < 0.3:
        tree = json.loads(data[8 : 8 + length])
        name = draw.choice([key for key in tree if key != "__metadata__"])
        tree[name][draw.choice(("dtype", "shape", "data_offsets"))] = draw.choice(
            ("F64", [10**13], [0, 10**15], [-1, 4], None, "F99", [2**63, 2**63], [[1]])
        )
        header = json.dumps(tree).encode()
    claimed = len(header) if draw.random() < 0.7 else draw.choice((0, 1, 2**40, 2**63, len(header) + 9))
    return struct.pack("<Q", claimed) + header + data[8 + length :]


@dataclass(frozen=True)
class Target:
    """A file that is damaged, and what reads it.

    Attributes:
        file: inside the folder that `make` fills.
        make: writes a folder in which everything is well.
        read: reads it.
        damage: what is done to the file.
    """

    file: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    damage: Callable[[bytes, random.Random], bytes] = mutated


def tried(target: Target, whole: Path, folder: Path, seed: int) -> str:
    """Damages a copy of `whole` and reads it: `read`, or `refused`.

    Raises:
        AssertionError: the refusal is no single line, or something was written elsewhere.
        Exception: what the reader did not expect.
    """
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(whole, folder)
    file = folder / target.file
    file.write_bytes(target.damage(file.read_bytes(), random.Random(seed)))
    before = sorted(path.name for path in folder.parent.iterdir())
    try:
        target.read(folder)
        said = ""
    except FusionError as error:
        said = str(error)
    assert len(" ".join(said.split())) < LONGEST, said[:300]
    assert sorted(path.name for path in folder.parent.iterdir()) == before
    return "refused" if said else "read"


def _preset(kind: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        folder.mkdir(parents=True)
        shutil.copy(CONF / kind / ("paper.yaml" if kind == "fuse" else "vit-digits.yaml"), folder / "mine.yaml")

    return make


def _train_options(folder: Path) -> object:
    words = with_presets(["--config", str(folder / "mine.yaml")], "train")
    parser = train.build_parser(task_of(words))
    from fusionpl.cli.parsing import parse

    return parser.instantiate(parse(parser, words, train.PRESET))


def _fuse_options(folder: Path) -> object:
    parser, options = arguments(["--config", str(folder / "mine.yaml"), "--parents", "a", "b"], build_parser)
    return fuse_config(parser.instantiate(options))


def _report(folder: Path) -> None:
    report = Report([Row(name="parent a", accuracy=0.5, loss=1.0), Row(name="fused", accuracy=0.6, loss=0.9)])
    report.save(folder)


def _checkpoint(folder: Path) -> None:
    folder.mkdir(parents=True)
    torch.save({"epoch": 3, "state_dict": {"weight": torch.ones(4)}}, folder / "last.ckpt")


def _family(folder: Path) -> None:
    from importlib import resources

    folder.mkdir(parents=True)
    source = resources.files("fusionpl.families") / "library" / f"{next(iter(library()))}.yaml"
    (folder / "my.yaml").write_text(source.read_text())


def _images(folder: Path) -> None:
    import datasets
    from PIL import Image

    features = datasets.Features(picture=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    rows = {"picture": [Image.new("L", (8, 8), 9 * at) for at in range(24)], "label": [at % 2 for at in range(24)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")


def _pictures(folder: Path) -> None:
    data = ImageDataModule(DataConfig(path=str(folder), image_size=8, validation=4, calibration=4))
    for part in ("train", "test"):
        data.dataset(part)


def _corpus(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text("the cat sat on the mat and saw a bird in the tree.\n" * 200)


def _blocks(folder: Path) -> None:
    data = MaskedTextDataModule(MaskedTextConfig(path=str(folder), vocab_size=120, block_size=16, batch_size=8))
    next(iter(data.train_dataloader()))


def targets(run: Callable[[Path], object], text: Callable[[Path], object]) -> dict[str, Target]:
    """Every kind of file, by name.

    Args:
        run: writes a tiny run of images.
        text: writes a tiny model folder with a tokenizer.
    """
    return {
        "safetensors, body and header": Target("model/model.safetensors", run, load_model),
        "safetensors, header": Target("model/model.safetensors", run, load_model, header_mutated),
        "config.json": Target("model/config.json", run, load_model),
        "config.json of transformers": Target("model/config.json", text, load_model),
        "tokenizer.json": Target("model/tokenizer.json", text, load_tokenizer),
        "tokenizer_config.json": Target("model/tokenizer_config.json", text, load_tokenizer),
        "a run's config.yaml": Target("config.yaml", run, settings_in),
        "a preset of fuse, as a library": Target(
            "mine.yaml", _preset("fuse"), lambda folder: load_config(folder / "mine.yaml")
        ),
        "a preset of fuse": Target("mine.yaml", _preset("fuse"), _fuse_options),
        "a preset of train": Target("mine.yaml", _preset("train"), _train_options),
        "a family": Target("my.yaml", _family, lambda folder: read_family(folder / "my.yaml")),
        "report.json": Target("report.json", _report, Report.load),
        "a checkpoint": Target("last.ckpt", _checkpoint, lambda folder: read_checkpoint(folder / "last.ckpt")),
        "images in parquet": Target("train.parquet", _images, _pictures),
        "a text corpus": Target("train.txt", _corpus, _blocks),
    }
