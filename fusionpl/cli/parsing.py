"""From a command line to options: files of `--config`, presets by their names, one line for a mistake."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from fusionpl.errors import FusionError
from fusionpl.options import check_sections, explain, read_yaml
from fusionpl.presets import CONF, preset, presets

# Options that don't change what comes out.
NO_SETTINGS = (
    "config", "output", "overwrite", "resume", "push_to", "push_private", "advise", "check", "dry_run",
)  # fmt: skip
# Options that say which data they are.
WHICH = ("path", "name", "text_column", "text_columns", "label_column", "classes")


def new_parser(description: str, *, presets: bool = True) -> ArgumentParser:
    """A parser whose mistakes `parse` turns into one line; an option is its full name, never an abbreviation.

    Args:
        description: of the command.
        presets: whether it has some, see `with_presets`.
    """
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a YAML file of these options"
                        + ", or the name of one that --list-presets lists" * presets)  # fmt: skip
    return parser


def parse(parser: ArgumentParser, argv: Sequence[str], default: Path) -> Namespace:
    """Parses the command line over the preset `default`, or over the file that `--config` names.

    Raises:
        FusionError: an unknown option or key (with the nearest known one), or a value of the wrong type.
    """
    return parse_options(parser, argv if configs_in(argv) else ["--config", str(default), *argv])


def parse_options(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parses a command line.

    Raises:
        FusionError: see `parse`; a section of the file that `--config` names holds no options.
    """
    for _, file in configs_in(argv):
        if Path(file).is_file():
            check_sections(read_yaml(file), parser, file)
    try:
        options = parser.parse_args(list(argv))
    except ArgumentError as error:
        raise FusionError(explain(str(error), parser)) from error
    loggers = options.get("logger") or []
    if "none" in loggers and len(loggers) > 1:
        raise FusionError(f"--logger {' '.join(loggers)}: none leaves the others out; leave none out, or them")
    return options


def configs_in(argv: Sequence[str]) -> list[tuple[int, str]]:
    """What `--config` names: the place of the word that ends with it, and the name."""
    places = []
    for at, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if option == "--config" and equals:
            places.append((at, value))
        elif option == "--config" and at + 1 < len(argv):
            places.append((at + 1, argv[at + 1]))
    return places


def said(argv: Sequence[str], option: str, nargs: str | None = None) -> Any:
    """The value of an option on a command line whose parser it decides; None where it is not given.

    Args:
        argv: the arguments.
        option: such as `--task`.
        nargs: see argparse.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument(option, dest="value", nargs=nargs)
    return peek.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0].value


def with_presets(argv: Sequence[str], kind: str) -> list[str]:
    """The arguments, with the files of presets that `--config` calls by their names.

    Args:
        argv: the arguments; `--list-presets` prints the names and ends the command.
        kind: of presets, a folder of conf/.

    Raises:
        FusionError: there is no such file or preset, or it holds no settings.
    """
    if "--list-presets" in argv:
        descriptions = presets(kind)
        print(*(f"{name.ljust(max(map(len, descriptions)))}  {what}" for name, what in descriptions.items()), sep="\n")
        raise SystemExit(0)
    words = list(argv)
    for place, name in configs_in(argv):
        file = preset(kind, name)
        if not read_yaml(file):
            raise FusionError(f"{file} holds no settings; leave --config out for the default preset")
        words[place] = words[place].removesuffix(name) + str(file)
    return words


def settings_of(parser: ArgumentParser, options: Namespace) -> dict[str, Any]:
    """What decides a result, as plain values: `--config` reads it back. Leaves out where the output goes, and what only
    looks."""
    result_options = options.clone()
    for key in NO_SETTINGS:
        result_options.pop(key, None)
    settings: dict[str, Any] = yaml.safe_load(parser.dump(result_options, skip_validation=True))
    return settings


def changed_settings(
    settings: Mapping[str, Any], argv: Sequence[str], parser: ArgumentParser, default: Path | None
) -> dict[str, Any]:
    """What a command line changes: those of its settings that neither a preset nor, of data, the models' runs say.

    Of data of each parent it is which they are.

    Args:
        settings: see `settings_of`.
        argv: the command line; presets that its `--config` names are no change, files of the user's own are.
        parser: that read it.
        default: the preset that is used without `--config`.
    """
    files = [Path(file) for _, file in configs_in(argv)] or ([default] if default else [])
    words = [word for file in files if file.is_relative_to(CONF) for word in ("--config", str(file))]
    changed = _differing(settings, settings_of(parser, parse_options(parser, words)))
    if own := settings.get("own_data"):
        changed.pop("data", None)  # the anchor's of these
        names = (
            own if isinstance(own, Mapping) else dict(zip(settings.get("parents", range(len(own))), own, strict=True))
        )
        changed["own_data"] = {
            name: {key: value for key, value in names[name].items() if key in WHICH and value is not None}
            for name in names
        }
    return changed


def _differing(settings: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """What of nested settings is not in others, or another value there."""
    changed = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            value = _differing(value, base.get(key) or {})
            if value:
                changed[key] = value
        elif value != base.get(key):
            changed[key] = value
    return changed
