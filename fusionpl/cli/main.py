"""`fusionpl COMMAND`: all commands; train.py, fuse.py and finetune.py of a checkout are three of them."""

import importlib
import sys
from collections.abc import Sequence

from fusionpl.cli import running
from fusionpl.errors import FusionError, nearest

COMMANDS = {
    "train": "trains a parent from scratch",
    "fuse": "aligns parents and fuses them into one",
    "finetune": "finetunes a fused model beside its baselines",
    "evaluate": "figures of models, their ensemble and plain average",
    "sweep": "fuses under every combination of options",
    "push": "puts a finished model on the hub",
    "check": "proves a family on your own models: `fuse --check`",
    "family": "drafts the family of an architecture that the library lacks, or proves one",
    "completion": "prints a script with which your shell completes all this",
}


def run(argv: Sequence[str]) -> None:
    """Hands over to the command that the first word names.

    Raises:
        FusionError: there is no such command.
    """
    name, *words = argv or ["--help"]
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {command.ljust(width)}  {what}" for command, what in COMMANDS.items()]
        print(
            "fusionpl COMMAND [OPTIONS]\n",
            *lines,
            "\nfusionpl COMMAND --help; train, fuse and finetune have presets: --list-presets",
            sep="\n",
        )
    elif name == "--version":
        from fusionpl import __version__

        print(f"fusionpl {__version__}")
    elif name in COMMANDS:
        if name == "check":
            name, words = "fuse", [*words, "--check"]
        importlib.import_module(f"fusionpl.cli.{name}").run(words)
    else:
        raise FusionError(f"there is no command '{name}'{nearest(name, COMMANDS)}; use {', '.join(COMMANDS)}")


def main() -> int:
    """The console command."""
    return running.main(run)


if __name__ == "__main__":
    sys.exit(main())
