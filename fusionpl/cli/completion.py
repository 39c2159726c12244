"""`fusionpl completion bash`: a script with which a shell completes the commands, their options and values."""

import argparse
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

import shtab
from jsonargparse import ArgumentParser

from fusionpl.cli import evaluate, family, finetune, fuse, push, sweep, train
from fusionpl.cli.main import COMMANDS
from fusionpl.cli.parsing import parse_options
from fusionpl.presets import presets

PARSERS = {
    "train": train.build_parser,
    "fuse": fuse.build_parser,
    "finetune": finetune.build_parser,
    "evaluate": evaluate.build_parser,
    "sweep": sweep.build_parser,
    "push": push.build_parser,
    "check": fuse.build_parser,
    "family": family.build_parser,
}


def build_parser() -> ArgumentParser:
    """The options of the command."""
    parser = ArgumentParser(
        description="Prints a script with which a shell completes fusionpl: source <(fusionpl completion bash). "
        "Options of data are those of images.",
        exit_on_error=False,
    )
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    return parser


def run(argv: Sequence[str]) -> None:
    """Prints the script with which a shell completes fusionpl.

    Raises:
        FusionError: the shell is not known.
    """
    shell = parse_options(build_parser(), argv).shell
    plain = argparse.ArgumentParser("fusionpl")
    commands = plain.add_subparsers()
    for name, build in PARSERS.items():
        kind = "fuse" if name in ("sweep", "check") else name
        _copy(build(), commands.add_parser(name, help=COMMANDS[name]), list(presets(kind)))
    print(shtab.complete(plain, shell))


def _copy(parser: ArgumentParser, plain: argparse.ArgumentParser, named: Sequence[str]) -> None:
    """The options of a parser with their values. jsonargparse's own script also spells out the arguments of every
    class that an option may name, and takes 100 MB for these commands."""
    for action in parser._actions:
        long = [option for option in action.option_strings if not option.endswith(".help")]
        if long and action.help != argparse.SUPPRESS and action.dest != "help":
            values = named if action.dest == "config" else _values(getattr(action, "_typehint", None))
            words: dict[str, Any] = {"action": "store_true"} if action.nargs == 0 else {"choices": values or None}
            plain.add_argument(*long, help=(action.help or "").replace("%", "%%"), **words)


def _values(hint: Any) -> list[str]:
    """The values that a type names."""
    if hint is bool:
        return ["true", "false"]
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint)]
    return [value for member in get_args(hint) for value in _values(member)]
