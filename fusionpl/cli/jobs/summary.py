"""The last lines of a command, the same of all: what was made, how long that took, where the files of Weights & Biases
lie, and the next command."""

import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from fusionpl.evaluation.steps import SCRIPTS, Step


def print_summary(made: str, seconds: float, dashboard: str, steps: Iterable[Step]) -> None:
    """Ends what a command prints.

    Args:
        made: a folder and what is new in it, `runs/fused: model/, report/report.html`; empty where nothing was written.
        seconds: how long the command took.
        dashboard: the line of `finish_loggers`, empty where there is none.
        steps: what to do next, the best first.
    """
    took = f"took: {seconds:.0f} s"
    print("", *([f"made: {made}"] if made else []), took, *([dashboard] if dashboard else []), sep="\n")
    for step in steps:
        print(f"next: {spoken(step.words)}  # {step.why}" if step.words else f"next: {step.why}")


def spoken(words: Sequence[str]) -> str:
    """A command as the user's shell takes it, said as this process was started.

    Args:
        words: the command's name and its arguments: `fuse`, `--parents`, ... may become `python fuse.py --parents ...`.
    """
    command, *arguments = words
    program = Path(sys.argv[0])
    if program.name == "fusionpl":
        return shlex.join(["fusionpl", *words])
    if command in SCRIPTS:
        script = program.with_name(SCRIPTS[command]) if program.name in SCRIPTS.values() else Path(SCRIPTS[command])
        if script.is_file():
            return shlex.join([_python(), str(script), *arguments])
    return shlex.join([_python(), "-m", "fusionpl.cli.main", *words])


def _python() -> str:
    """`python` where that is the one that runs, else where this one lies."""
    if shutil.which("python") == sys.executable:
        return "python"
    running = Path(sys.executable)
    return str(running.relative_to(Path.cwd())) if running.is_relative_to(Path.cwd()) else str(running)
