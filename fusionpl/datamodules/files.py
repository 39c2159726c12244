"""Data files on this machine: which kind they are of, and how `datasets` is asked to read them."""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fusionpl.errors import FusionError

KINDS = {".txt": "text", ".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
IMAGES = "images"
READ = (
    "--data.path reads .txt, .csv, .tsv, .json, .jsonl and .parquet files, also as .gz, folders of one kind of them, "
)
READ += "and folders of images by class"
ABOUT = ("readme", "license", "notice", "citation")  # files that tell about data
ABOUT_JSON = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def kind_of(file: Path) -> str | None:
    """The kind of a data file, by its ending; None for another file."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    suffix = file.with_suffix("").suffix if file.suffix.lower() in COMPRESSED else file.suffix
    return KINDS.get(suffix.lower()) or (IMAGES if suffix.lower() in ImageFolder.EXTENSIONS else None)


def file_arguments(file: Path) -> dict[str, Any]:
    """Arguments of `datasets.load_dataset` for one data file, which is a train split.

    Raises:
        FusionError: the file is of no kind that is read.
    """
    kind = kind_of(file)
    if kind is None or kind == IMAGES:
        raise FusionError(f"{file} is no data file; {READ}")
    absolute = glob.escape(str(file.resolve().parent / file.name))  # a name may have brackets
    return {"path": "csv" if kind == "tsv" else kind, "data_files": {"train": [absolute]}, **_reading(kind)}


def folder_arguments(folder: Path) -> dict[str, Any]:
    """Arguments of `datasets.load_dataset` for a folder, whose files' and folders' names say their split.

    Raises:
        FusionError: the folder has no data files, or of several kinds, of which `datasets` would read one only.
    """
    described = (folder / "README.md").is_file() and "configs:" in (folder / "README.md").read_text(errors="replace")
    kinds = Counter(kind for _, kind in _data_files(folder))
    if kinds[IMAGES]:  # tables beside images tell about them
        kinds = Counter({IMAGES: kinds[IMAGES]})
    if len(kinds) > 1 and not described:
        counts = " and ".join(f"{count:,} of {kind}" for kind, count in kinds.most_common())
        raise FusionError(f"{folder} has data files of several kinds, {counts}; keep one kind there, or name a file")
    return {"path": str(folder), **(_reading("text") if "text" in kinds else {})}


def check_any(folder: Path) -> None:
    """Raises FusionError where a folder has no data file."""
    if not any(True for _ in _data_files(folder)):
        raise FusionError(f"{folder} has no data files; {READ}")


def unread(folder: Path, read: Mapping[str, Any]) -> list[Path]:
    """The data files of a folder that `datasets` leaves out, since names of others say their split.

    Args:
        folder: of one kind of data files.
        read: split -> files that are read.
    """
    used = {os.path.abspath(file) for files in read.values() for file in files}
    files = list(_data_files(folder))
    kind = IMAGES if any(kind == IMAGES for _, kind in files) else None
    return [file for file, own in files if (kind is None or own == kind) and os.path.abspath(file) not in used]


def _reading(kind: str) -> dict[str, Any]:
    # Windows puts a byte order mark before text, which is none of it.
    return {"text": {"encoding": "utf-8-sig"}, "tsv": {"sep": "\t"}}.get(kind, {})


def _data_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """The data files of a folder with their kinds; hidden files and what tells about data are none."""
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for name in sorted(names):
            kind = kind_of(Path(name))
            about = name.lower().startswith(ABOUT) or name in ABOUT_JSON
            if kind is not None and not about and not name.startswith((".", "__")):
                yield Path(where) / name, kind
