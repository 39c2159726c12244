"""Where figures go: a CSV file always, Weights & Biases and TensorBoard if asked."""

import csv
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from fusionpl.files import whole
from fusionpl.paths import public_settings
from fusionpl.training.config import LoggerName
from fusionpl.training.weights_and_biases import FolderRun, Job, finish_run


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
        """Adds figures to their epoch's row, or those of no epoch to the last row, and rewrites the file."""
        epoch = int(metrics.get("epoch", max(self._rows, default=0)))
        if self._from is None and "epoch" in metrics:  # later epochs in a resumed run's file were never finished
            self._from = epoch
            self._rows = {known: row for known, row in self._rows.items() if known < epoch}
        row = self._rows.setdefault(epoch, {"epoch": epoch, "step": step})
        row.update({key: value for key, value in metrics.items() if key != "epoch"})
        if step is not None:
            row["step"] = step
        columns = list(dict.fromkeys(key for row in self._rows.values() for key in row))
        with whole(self.path) as new, new.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self._rows.values())

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Logs nothing: the run's config.yaml has them."""


def make_loggers(
    names: Sequence[LoggerName],
    folder: Path,
    *,
    name: str,
    job: Job,
    group: str | None = None,
    config: dict[str, Any] | None = None,
    resume: bool = False,
) -> list[Logger]:
    """The loggers of a run. `folder`/metrics.csv is written whatever their names are.

    Args:
        names: `wandb` and `tensorboard`, whose event files lie in `folder`/tensorboard; `csv` and `none` add nothing.
        folder: the output that is logged; it need not be there yet.
        name: the run's name on the dashboard.
        job: its type there.
        group: what it is grouped by there.
        config: settings to show there.
        resume: whether the run continues one in the same folder.
    """
    loggers: list[Logger] = [MetricsFile(folder / "metrics.csv", resume=resume)]
    if "tensorboard" in names:
        loggers.append(TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False))
    if "wandb" in names:
        loggers.append(
            FolderRun(folder, name=name, job=job, group=group, config=public_settings(config or {}), resume=resume)
        )
    return loggers


def finish_loggers(loggers: Sequence[Logger]) -> str:
    """Writes what is left to write, and gives the line that says where a Weights & Biases run is; empty without one,
    and in all processes but the first."""
    line: str = rank_zero_only(_finish, "")(loggers)
    return line


def _finish(loggers: Sequence[Logger]) -> str:
    line = ""
    for logger in loggers:
        if isinstance(logger, FolderRun):
            line = finish_run(logger)
        else:
            logger.finalize("success")
    return line
