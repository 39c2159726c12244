"""A report on the Weights & Biases dashboard: rows, pictures, the model, and the parents it came from."""

from collections.abc import Sequence
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, WandbLogger

from fusionpl.evaluation import Report


@rank_zero_only
def log_report(loggers: Sequence[Logger], report: Report, folder: Path, *, parents: Sequence[str] = ()) -> None:
    """Logs a saved report and the model beside it.

    Args:
        loggers: those of the run; all get the figures, Weights & Biases also table, pictures and artifacts.
        report: what was measured.
        folder: the run folder with `report/` and `model/`.
        parents: where the parents came from: folders become input artifacts of the fused model. Weights & Biases
            cannot link artifacts while offline; the run's config names the parents then.
    """
    figures = {
        f"{row.name} {row.stage}/{metric}": value
        for row in report.rows
        for metric, value in (("accuracy", row.accuracy), ("loss", row.loss))
        if value is not None
    }
    for logger in loggers:
        logger.log_metrics(figures)
        if isinstance(logger, WandbLogger):
            import wandb

            columns, rows = report.rows_as_table()
            run = logger.experiment
            run.log({"report": wandb.Table(columns=list(columns), data=list(rows))})
            for picture in sorted((folder / "report").glob("*.png")):
                run.log({f"report/{picture.stem}": wandb.Image(str(picture))})
            if not run.offline:
                for parent in filter(lambda path: (Path(path) / "model").is_dir(), parents):
                    run.use_artifact(_artifact(Path(parent)))
            run.log_artifact(_artifact(folder))


def _artifact(folder: Path):  # type: ignore[no-untyped-def]  # wandb.Artifact, imported on demand
    import wandb

    artifact = wandb.Artifact(f"{folder.resolve().parent.name}-{folder.name.strip('.')}", type="model")
    artifact.add_dir(str(folder / "model"))
    return artifact
