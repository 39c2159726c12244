"""The presets of conf/, which a checkout has at its top and an installed package inside."""

from pathlib import Path

from fusionpl.errors import FusionError, nearest

_INSIDE = Path(__file__).parent / "conf"
CONF = _INSIDE if _INSIDE.is_dir() else Path(__file__).parents[1] / "conf"


def presets(kind: str) -> dict[str, str]:
    """The presets of a kind (`train`, `fuse`, `finetune`): name -> what it is, from the comment in its first line."""
    descriptions = {}
    for file in sorted((CONF / kind).glob("*.yaml")):
        first = file.read_text().partition("\n")[0]
        descriptions[file.stem] = first.removeprefix("#").strip() if first.startswith("#") else ""
    return descriptions


def preset(kind: str, name: str | Path) -> Path:
    """The file of a preset.

    Args:
        kind: `train`, `fuse` or `finetune`.
        name: a file, or the name of one in conf/KIND.

    Raises:
        FusionError: there is neither.
    """
    file = Path(name)
    if file.is_file():
        return file
    known = presets(kind)
    if str(name) in known:
        return CONF / kind / f"{name}.yaml"
    if file.suffix or file.name != str(name):
        raise FusionError(f"there is no configuration file {name}")
    raise FusionError(f"there is no preset '{name}'{nearest(str(name), known)}; use {', '.join(known)}, or a file")
