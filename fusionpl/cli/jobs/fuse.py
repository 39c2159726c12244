"""Align, average, evaluate, report."""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from tqdm import tqdm

from fusionpl.calibration.batches import no_progress
from fusionpl.calibration.forward import has_float64
from fusionpl.cli.fuse import Asked
from fusionpl.cli.jobs.fused import measured, write_fused
from fusionpl.cli.jobs.looking import advised, check, show_plan
from fusionpl.cli.jobs.parents import Job
from fusionpl.cli.jobs.push import push_run
from fusionpl.cli.jobs.summary import print_summary
from fusionpl.cli.outputs import staged
from fusionpl.cli.running import is_main_process, quiet
from fusionpl.datamodules.joint import OwnSplits
from fusionpl.errors import FusionError
from fusionpl.evaluation.bench import Cost, Made
from fusionpl.fusion.fuse import Fusion
from fusionpl.fusion.result import FusionResult
from fusionpl.models.folders import heads_in
from fusionpl.models.lineage import Ancestor, ancestor
from fusionpl.training.dashboard import log_models, log_report
from fusionpl.training.loggers import finish_loggers, make_loggers
from fusionpl.training.weights_and_biases import dashboard_name, open_run


def fuse(asked: Asked) -> None:
    """Fuses parents, or shows, checks or advises what the options say.

    Raises:
        FusionError: a user's mistake.
    """
    quiet()
    started, args = time.monotonic(), asked.args
    fabric = _fabric(args.trainer)
    job = Job.of(asked, fabric.device if has_float64(fabric.device) else torch.device("cpu"))
    fusion = job.prepared(asked.config)
    others = {name: job.prepared(config) for name, config in asked.presets.items()}
    for other in others.values():
        job.check_room(other)
    if args.dry_run:
        show_plan(job, fusion)
        return
    job.data.check_model(job.team.reference.module, job.team.reference.logits)
    if args.check:
        check(job)
    elif args.advise:
        print(*advised(job).lines, sep="\n")
    else:
        job.check_room(fusion, asked.output)
        _check_alone(asked.alternatives, fabric.world_size)
        _fuse(job, fusion, others, fabric, started)


def _fuse(job: Job, fusion: Fusion, others: Mapping[str, Fusion], fabric: L.Fabric, started: float) -> None:
    """Fuses, measures, and writes all of it; `started` is when the command was."""
    asked, args, output = job.asked, job.asked.args, job.asked.output
    ancestors = _announced(job) if is_main_process() else []
    loggers = make_loggers(
        args.logger, output, name=f"fuse {output.name}", job="fuse", group=dashboard_name(output), config=asked.settings
    )
    with staged(output, args.overwrite) if is_main_process() else nullcontext(output) as folder:
        fabric.launch()
        open_run(loggers, folder)  # whose system metrics then show the fusion
        result, cost = _run(job, fusion, fabric, folder)
        made: dict[str, Made] = {}
        for name, other in others.items():
            compared, took = _run(job, other, fabric)
            made[name] = compared.network, took
        if not fabric.is_global_zero:
            return
        report = measured(job, result, cost, made)
        write_fused(folder, job, result.config.strategy, ancestors, report)
    lines = [*(f"warning: {line}" for line in result.warnings), *result.notes, *job.remarks]
    print(*lines, f"\n{report.table()}", sep="\n")
    log_report(loggers, report, output / "report")
    apart = heads_in(output)
    log_models(loggers, used=args.parents, made=None if apart else output)
    dashboard = finish_loggers(loggers)
    if args.push_to is not None:
        push_run(output, args.push_to, private=args.push_private)
    models = ", ".join(f"{folder.name}/" for folder in apart.values()) or "model/"
    written = f"{output}: {models}, report/report.html, maps.safetensors"
    print_summary(written, time.monotonic() - started, dashboard, report.steps)


def _check_alone(alternatives: Sequence[str], processes: int) -> None:
    """Refuses to train in several processes what is compared with."""
    if alternatives and processes > 1:
        raise FusionError(
            f"--compare {' '.join(alternatives)} trains in one process, not in {processes}; add --trainer.devices 1"
        )


def _announced(job: Job) -> list[Ancestor]:
    """Says what is fused, and finds out what a card tells of it: now, for the commits that are fused, as a branch may
    move."""
    parents, team = job.asked.parents, job.team
    depths = " and ".join(dict.fromkeys(str(binding.depth) for binding in team.bindings))
    print(f"parents: {', '.join(parents)} ({team.binding.family.name}, {depths} blocks); anchor: {team.reference.name}")
    if isinstance(job.data, OwnSplits):
        print(f"data of each parent: {job.data.describe()}")
    return [ancestor(name, path) for name, path in parents.items()]


def _run(job: Job, fusion: Fusion, fabric: L.Fabric, output: Path | None = None) -> tuple[FusionResult, Cost]:
    """Fuses in the processes that are there, and says what it took; the first writes the model."""
    started, config, main = time.monotonic(), fusion.plan.config, fabric.is_global_zero
    result = fusion.run(
        job.data.calibration_dataloader(),
        output=output if main else None,
        unlabelled=job.data.unlabelled_dataloader() if config.refine.asked else None,
        augment=job.data.augmented,
        seed=job.asked.args.seed,
        progress=progress_bar if main else no_progress,
    )
    reads_nothing = config.align.evidence == "weights" and config.refit.method == "none"
    blind = reads_nothing and not config.refine.asked
    return result, Cost(None if blind else "unlabelled data", time.monotonic() - started)


def _fabric(options: Namespace) -> L.Fabric:
    """What starts the processes; there are no weights that FSDP could shard."""
    strategy = "ddp" if options.strategy == "fsdp" else options.strategy
    return L.Fabric(
        accelerator=options.accelerator, devices=options.devices, num_nodes=options.num_nodes, strategy=strategy
    )


def progress_bar(steps: Iterable[Any], label: str) -> Iterable[Any]:
    """A bar on a terminal, nothing elsewhere."""
    bar: Iterable[Any] = tqdm(steps, desc=label, leave=False, dynamic_ncols=True, disable=None)
    return bar
