"""Where commands write: one at a time, whole or not at all, whatever killed the command before."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from fusionpl.cli.claims import claimed
from fusionpl.cli.running import is_main_process
from fusionpl.errors import FusionError
from fusionpl.options import SETTINGS, settings_in


def in_sweep(folder: Path) -> Path:
    """A default output, with the run's id in its name under `wandb agent`: every run of a sweep has its own."""
    run = os.environ.get("WANDB_RUN_ID")
    return folder.with_name(f"{folder.name}-{run}") if run and "WANDB_SWEEP_ID" in os.environ else folder


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuses an output folder that is taken.

    Raises:
        FusionError: it exists and `overwrite` is off, or it is nothing this project wrote.
    """
    if not is_main_process() or not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise FusionError(f"{folder} exists; replace it with --overwrite, or choose another folder with --output")
    if not (folder / SETTINGS).is_file():
        raise FusionError(f"{folder} is not an output of fusionpl (no {SETTINGS}), so --overwrite leaves it alone")


@contextmanager
def staged(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write to, which becomes `folder` at the end; after an error `folder` is as it was.

    Raises:
        FusionError: see `check_output`; another run is writing there.
    """
    with claimed(folder) as claim:
        check_output(folder, overwrite)
        written = claim.place / "new"
        written.mkdir()
        yield written
        claim.set_aside()
        written.rename(claim.output)


@contextmanager
def run_folder(folder: Path, overwrite: bool, keep: str) -> Iterator[Path]:
    """A folder for a run that takes long: what is in it at an error stays, if the run can be resumed from it.

    Args:
        folder: the run folder.
        overwrite: whether to replace one that is there.
        keep: the file that makes a run resumable; without it the folder is as it was before.

    Raises:
        FusionError: see `check_output`; another run is writing there.
    """
    if not is_main_process():
        yield folder
        return
    with claimed(folder) as claim:
        check_output(folder, overwrite)
        claim.set_aside()
        claim.keep_with(keep)
        claim.output.mkdir()
        try:
            yield folder
        except BaseException:
            if not (claim.output / keep).exists():
                claim.put_back()
            raise


def check_resumable(folder: Path, strategy: str) -> None:
    """Refuses to resume what was not started, or with FSDP what was started without it, or the reverse: they number
    parameters differently.

    Raises:
        FusionError: so.
    """
    if not (folder / SETTINGS).is_file():
        raise FusionError(f"there is no finetuning to resume in {folder}; start one without --resume")
    before = settings_in(folder).get("trainer", {}).get("strategy", "auto")
    if (before == "fsdp") != (strategy == "fsdp"):
        raise FusionError(
            f"{folder} was started with trainer.strategy {before}, not {strategy}; give --resume the options of the "
            "start"
        )


@contextmanager
def resumed(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a run folder while its run goes on, and removes what lies beside it of one that was
    killed.

    Raises:
        FusionError: another run is writing there.
    """
    with claimed(folder) if is_main_process() and folder.is_dir() else nullcontext():
        yield
