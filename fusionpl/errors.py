"""What a user can mend: one line that names the thing and the next step."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints


class FusionError(Exception):
    """A user's mistake. The message is one line; the command line prints it and exits with code 2."""


def reason(error: BaseException, limit: int = 200) -> str:
    """What a library says went wrong, in a line: the first of its words, cut, or the name of the error where it has
    none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    first = lines[0].strip()
    return first if len(first) <= limit else first[: limit - 4].rstrip() + " ..."


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `"; did you mean 'X'?"` for the known name most like `name`, or `""` if none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings as dotted keys, the way the command line and messages write them."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def check_choices(options: Any, name: str = "") -> None:
    """Checks the fields of a dataclass that are one of some words.

    Args:
        options: the dataclass.
        name: of the section that it is, such as `align`.

    Raises:
        FusionError: a word that is none of them; names the nearest.
    """
    for key, kind in get_type_hints(type(options)).items():
        if get_origin(kind) is Literal and (value := getattr(options, key)) not in get_args(kind):
            known = get_args(kind)
            place = ".".join(filter(None, (name, key)))
            raise FusionError(f"{place} is one of {', '.join(known)}, not {value!r}{nearest(str(value), known)}")
