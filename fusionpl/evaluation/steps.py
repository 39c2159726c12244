"""What to do after a report: a command, and what it is good for."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusionpl.paths import public_command

SCRIPTS = {command: f"{command}.py" for command in ("train", "fuse", "finetune")}  # of a checkout


@dataclass(frozen=True)
class Step:
    """What may follow.

    Attributes:
        why: what it is good for, a few words.
        words: the command's name and arguments, `["finetune", "--model", "runs/fused"]`; empty where no one command
            does it.
    """

    why: str
    words: Sequence[str] = ()

    @property
    def command(self) -> str:
        """The command as a file shows it that others may read: see `public_command`."""
        if not self.words:
            return ""
        name, *arguments = self.words
        program = ["python", SCRIPTS[name]] if name in SCRIPTS else ["python", "-m", f"fusionpl.cli.{name}"]
        return public_command([*program, *arguments])

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Step":
        """Reads what `as_dict` gave."""
        return cls(values["why"], tuple(values["words"]))

    def as_dict(self) -> dict[str, Any]:
        """The step for JSON, paths in it as others may see them."""
        return {"why": self.why, "words": shlex.split(public_command(self.words))}
