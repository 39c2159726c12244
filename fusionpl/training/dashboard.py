"""Reports and models on dashboards: figures, table, pictures, and which model was made of which."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from PIL import Image

from fusionpl.evaluation.report import Report
from fusionpl.training.weights_and_biases import dashboard_name

if TYPE_CHECKING:
    from wandb import Artifact


@rank_zero_only
def log_report(loggers: Sequence[Logger], report: Report, folder: Path) -> None:
    """Logs a saved report: figures everywhere, table and pictures on Weights & Biases and TensorBoard.

    Args:
        loggers: those of the run.
        report: what was measured.
        folder: where the report was saved.
    """
    figures = {
        f"{row.name} {row.stage}/{metric}": value
        for row in report.rows
        for metric, value in (("accuracy", row.accuracy), ("loss", row.loss))
        if value is not None
    }
    pictures = {f"report/{path.stem}": path for path in sorted(folder.glob("*.png"))}
    for logger in loggers:
        logger.log_metrics(figures)
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("report", report.markdown())
            for name, path in pictures.items():
                image = np.asarray(Image.open(path).convert("RGB"))
                logger.experiment.add_image(name, image, dataformats="HWC")
        if isinstance(logger, WandbLogger):
            import wandb

            columns, rows = report.rows_as_table()
            shown = {name: wandb.Image(str(path)) for name, path in pictures.items()}
            logger.experiment.log({"report": wandb.Table(columns=list(columns), data=list(rows)), **shown})


@rank_zero_only
def log_models(loggers: Sequence[Logger], *, used: Sequence[str | Path] = (), made: Path | None = None) -> None:
    """Logs models as Weights & Biases artifacts, so that its lineage shows which was made of which.

    Args:
        loggers: those of the run.
        used: where its models came from: run and model folders become input artifacts; hub ids stand in the run's
            configuration. Weights & Biases cannot link artifacts while offline: the configuration names all then.
        made: the output whose `model/` the run made, if any.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            run = logger.experiment
            if not run.offline:
                for model in filter(lambda path: Path(path).is_dir(), used):
                    run.use_artifact(_artifact(Path(model)))
            if made is not None:
                run.log_artifact(_artifact(made))


def _artifact(folder: Path) -> "Artifact":
    import wandb

    artifact = wandb.Artifact(dashboard_name(folder), type="model")
    model = folder / "model"
    artifact.add_dir(str(model if model.is_dir() else folder))
    return artifact
