"""The Weights & Biases run of a folder: what it is called, where it belongs, and how a resumed command finds it."""

import hashlib
import netrc
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, WandbLogger

from fusionpl.errors import FusionError, reason
from fusionpl.options import read_yaml

Job = Literal["train", "fuse", "finetune", "evaluate", "sweep"]
PROJECT = "fusionpl"
KEPT = "wandb.yaml"
# Of wandb.init's arguments, those whose variable is not called WANDB_ARGUMENT.
_VARIABLES = {"group": "WANDB_RUN_GROUP", "id": "WANDB_RUN_ID"}


class FolderRun(WandbLogger):
    """The run of a folder, opened when it is first logged to; the folder keeps its id and group if it is there by then.

    Its files lie beside the folder, in `wandb/`, where neither `--overwrite` nor a failure removes them. What the
    environment says comes first (WANDB_PROJECT, WANDB_RUN_GROUP, WANDB_MODE, ...); under `wandb agent`, the sweep
    decides which run it is and what it is called. Without an API key the run is kept offline.

    Args:
        folder: the output that is logged.
        name, job, group: what the run is called, its type, and what it is grouped by on the dashboard.
        config: settings to show there.
        resume: continue the run that the folder remembers.
    """

    def __init__(
        self, folder: Path, *, name: str, job: Job, group: str | None, config: dict[str, Any], resume: bool
    ) -> None:
        # Weights & Biases reads this when it is first used; what of its lines a user needs, `finish_run` says.
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self.folder = folder
        ours: dict[str, Any] = {"project": PROJECT, "dir": str(folder.resolve().parent), "job_type": job}
        if not has_wandb_key():
            ours["mode"] = "offline"
        if "WANDB_SWEEP_ID" not in os.environ:
            ours |= {"name": name, "group": group, "id": _kept(folder).get("id") if resume else None}
        super().__init__(
            save_dir=None,  # type: ignore[arg-type]  # the working directory by default, which would hide WANDB_DIR
            config=config,
            # What it gathers about a run names this machine and its folders.
            settings=wandb.Settings(**_unless_set({"console": "off", "x_disable_meta": True})),
            **_unless_set(ours),
        )
        self._wandb_init.pop("anonymous", None)  # Lightning always passes it on, and wandb warns about it

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of Weights & Biases, which the first use opens.

        Raises:
            FusionError: Weights & Biases refuses it.
        """
        import wandb

        first = self._experiment is None
        try:
            run = super().experiment
        except wandb.Error as error:
            raise FusionError(
                f"Weights & Biases: {reason(error).rstrip('.')}; keep the run offline with WANDB_MODE=offline, or "
                "leave it out with --logger csv"
            ) from error
        if first and self.folder.is_dir():
            self.keep(self.folder)
        return run

    def keep(self, folder: Path) -> None:
        """Writes the run's id and group into a folder."""
        run = self.experiment
        identity = {"id": run.id, **({"group": run.group} if run.group else {})}
        (folder / KEPT).write_text(yaml.safe_dump(identity, sort_keys=False))


@rank_zero_only
def open_run(loggers: Sequence[Logger], folder: Path) -> None:
    """Opens the Weights & Biases run among loggers now, and keeps its id and group in a folder."""
    for logger in loggers:
        if isinstance(logger, FolderRun):
            logger.keep(folder)


def finish_run(logger: FolderRun) -> str:
    """Closes a run, and says in a line where it is: its page, or its files and how to upload them."""
    run = logger.experiment
    run.finish()
    if not run.settings._offline:
        return f"Weights & Biases: {run.url}"
    why = "" if has_wandb_key() else "no API key, so "
    place = Path(run.settings.sync_dir).parent
    place = place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place
    sync = shlex.join(["wandb", "sync", str(place)])
    return f"Weights & Biases: {why}kept offline in {place}; upload it with: {sync}"


def group_of(models: Sequence[str | Path]) -> str | None:
    """The group of a run over models: the first that a folder remembers; else, of one folder, what it is called there.

    Args:
        models: run folders, model folders or hub ids.
    """
    known = next((group for model in models if (group := _kept(Path(model)).get("group"))), None)
    return known or (dashboard_name(models[0]) if len(models) == 1 and Path(models[0]).is_dir() else None)


def dashboard_name(folder: str | Path) -> str:
    """`vit-digits-fused-3f2a9c`: what Weights & Biases calls a folder, in characters that it takes.

    The digits, of the whole path, tell folders of equal names apart.
    """
    path = Path(folder).resolve()
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{path.parent.name}-{path.name}")[-100:].strip("-.")
    return f"{readable}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}"


def has_wandb_key() -> bool:
    """Whether Weights & Biases would find an API key: in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc().authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _kept(folder: Path) -> dict[str, Any]:
    file = folder / KEPT
    return read_yaml(file) if file.is_file() else {}


def _unless_set(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that no variable of the environment decides."""
    return {
        key: value
        for key, value in arguments.items()
        if value is not None and _VARIABLES.get(key, f"WANDB_{key.upper()}") not in os.environ
    }
