"""Where figures go: a CSV file always, Weights & Biases if asked."""

import csv
import netrc
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, WandbLogger

from fusionpl.paths import public_settings

LoggerName = Literal["wandb", "csv", "none"]
PROJECT = "fusionpl"


class MetricsFile(Logger):
    """One CSV row an epoch, complete after every epoch, continued by a resumed run.

    Lightning's CSVLogger writes several ragged rows an epoch and deletes the file when a run resumes.

    Args:
        path: the file.
        resume: whether to keep the epochs that are in it.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        super().__init__()
        self.path = path
        self._rows: dict[int, dict[str, Any]] = {}
        self._from: int | None = None
        if resume and path.is_file():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    self._rows[int(row["epoch"])] = {key: value for key, value in row.items() if value}

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    @property
    def version(self) -> str:
        """None: a run folder holds one run."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Adds figures to their epoch's row and rewrites the file."""
        epoch = int(metrics.get("epoch", 0))
        if self._from is None:  # later epochs in a resumed run's file were never finished
            self._from = epoch
            self._rows = {known: row for known, row in self._rows.items() if known < epoch}
        row = self._rows.setdefault(epoch, {"epoch": epoch})
        row.update({"step": step} | {key: value for key, value in metrics.items() if key != "epoch"})
        columns = list(dict.fromkeys(key for row in self._rows.values() for key in row))
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self._rows.values())
        os.replace(temporary, self.path)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's config.yaml has them."""


def make_loggers(
    kind: LoggerName, folder: Path, *, name: str, config: dict[str, Any] | None = None, resume: bool = False
) -> list[Logger]:
    """The loggers of a run. `folder`/metrics.csv is written whatever `kind` is.

    Args:
        kind: `wandb`, or `csv` or `none` for the CSV file alone.
        folder: the run folder; Weights & Biases keeps its files in its `wandb/`.
        name: the run's name on the dashboard.
        config: settings to show there.
        resume: whether the run continues one in the same folder.
    """
    loggers: list[Logger] = [MetricsFile(folder / "metrics.csv", resume=resume)]
    if kind == "wandb":
        import wandb

        dashboard = WandbLogger(
            project=PROJECT,
            name=name,
            save_dir=folder,
            offline=not has_wandb_key(),
            config=public_settings(config or {}),
            settings=wandb.Settings(silent=True, console="off", x_disable_meta=True),  # which names this machine
        )
        dashboard._wandb_init.pop("anonymous", None)  # Lightning always passes it on, and wandb warns about it
        loggers.append(dashboard)
    return loggers


def has_wandb_key() -> bool:
    """Whether Weights & Biases would find an API key: in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc().authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


@rank_zero_only
def finish_loggers(loggers: Sequence[Logger]) -> None:
    """Closes the Weights & Biases run, and says how to upload it if it was kept offline."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            run = logger.experiment
            folder = Path(run.dir).parent
            run.finish()
            if run.settings._offline:
                print(f"Weights & Biases: no API key, so the run was kept offline; upload it with: wandb sync {folder}")
