"""Reading options: mistakes in one line, whether they come from a command line, a file or a call."""

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from fusionpl.errors import FusionError, nearest

SETTINGS = "config.yaml"  # of a run


class _Once(yaml.SafeLoader):
    """Plain values alone, and each key once: of two, a reader would see the first and the program take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Raises yaml.YAMLError for a key that is given twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for at, key in enumerate(keys) if key in keys[:at]), None)
        if twice is not None:
            raise yaml.YAMLError(f"'{twice}' is given twice, the second time in line {_line(node, keys, twice)}")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _line(node: yaml.MappingNode, keys: list[Any], twice: Any) -> int:
    last = len(keys) - 1 - keys[::-1].index(twice)
    return int(node.value[last][0].start_mark.line) + 1


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        FusionError: there is no such file, it is not YAML, a key is given twice, or it holds no settings but a list, a
            number, ...
    """
    try:
        tree = yaml.load(Path(path).read_text(), _Once)  # a SafeLoader
    except FileNotFoundError as error:
        raise FusionError(f"there is no configuration file {path}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError, ValueError, RecursionError) as error:
        raise FusionError(f"{path} is not YAML that holds settings: {' '.join(str(error).split())}") from error
    if tree is not None and not isinstance(tree, dict):
        raise FusionError(f"{path} holds a {type(tree).__name__}, not settings like `align: {{solver: emd}}`")
    return tree or {}


def settings_in(run: str | Path) -> dict[str, Any]:
    """What a run's config.yaml holds; nothing where there is none."""
    file = Path(run) / SETTINGS
    return read_yaml(file) if file.is_file() else {}


def write_settings(run: Path, settings: Mapping[str, Any]) -> None:
    """Writes a run's config.yaml, which `settings_in` reads."""
    (run / SETTINGS).write_text(yaml.safe_dump(settings, sort_keys=False))


def check_sections(tree: Mapping[str, Any], parser: ArgumentParser, path: object) -> None:
    """Raises FusionError where a section of options, such as `align`, is empty or holds one value, and where an option
    that takes several values, such as `parents`, holds one that is no list."""
    defaults = parser.get_defaults(skip_validation=True)
    known = list(defaults.keys())
    for key, value in tree.items():
        if isinstance(value, str) and isinstance(defaults.get(key), list):
            raise FusionError(f"{path}: '{key}' takes a list; write `{key}: [{value}]`")
        if not isinstance(value, dict) and (options := [name for name in known if name.startswith(f"{key}.")]):
            raise FusionError(
                f"{path}: '{key}' holds no options, which are {options[0]} and such; leave it out for the defaults"
            )


def explain(message: str, parser: ArgumentParser) -> str:
    """jsonargparse's words in one line, with the nearest known name for an unknown one."""
    known = list(parser.get_defaults(skip_validation=True).keys())
    if match := re.match(r"unrecognized arguments: -*(\S+)", message):
        name = match[1].split("=")[0]
        return f"unknown option {message.split()[2]}{nearest(name, known)}"
    if match := re.match(r"Group '(.+)' does not accept option '(.+)'", message):
        name = f"{match[1]}.{match[2]}"
        return f"unknown key {name}{nearest(name, known)}"
    if match := re.match(r"Option '(.+)' is not accepted", message):
        return f"unknown key {match[1]}{nearest(match[1], known)}"
    if match := re.match(r'Parser key "(.+?)"(?: element \d+)?:\s*(.*)', message, flags=re.DOTALL):
        return f"{match[1]}: {_misfit(match[2])}"
    return message


def _misfit(reason: str) -> str:
    """What is wrong with a value: `'magic' is not sinkhorn or emd or assignment`."""
    if match := re.fullmatch(r"Expected a (.+?)\. Got value: (.*)", reason, flags=re.DOTALL):
        return f"{match[2]!r} is not {_readable(match[1])}"
    if match := re.search(r"Subtypes: \[(.+)\]\n.*Given value: (.*)", reason, flags=re.DOTALL):
        kinds = re.split(r", (?![^\[]*\])", match[1].partition("\n")[0].removesuffix("]"))
        return f"{match[2].strip()} is not {' or '.join(map(_readable, kinds))}"
    reason = reason.partition("\n")[0]
    return reason[:1].lower() + reason[1:]


def _readable(kind: str) -> str:
    if match := re.fullmatch(r"(?:typing\.)?Literal(\[.+\])", kind):
        return " or ".join(map(str, ast.literal_eval(match[1])))
    name = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", kind)
    return {"NoneType": "null"}.get(name, name)
