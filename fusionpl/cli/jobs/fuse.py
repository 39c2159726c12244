"""Align, average, evaluate, report."""

import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from torch import nn
from tqdm import tqdm

from fusionpl.calibration.batches import no_progress
from fusionpl.calibration.forward import has_float64
from fusionpl.cli.alternatives import DISTILLED
from fusionpl.cli.fuse import PRESET, Asked
from fusionpl.cli.jobs.alternative import distilled, trained_on
from fusionpl.cli.jobs.cards import command_section, fused_card, metadata
from fusionpl.cli.jobs.looking import advised, check
from fusionpl.cli.jobs.measuring import Cost, Made, measure
from fusionpl.cli.jobs.parents import Job
from fusionpl.cli.jobs.push import push_run
from fusionpl.cli.outputs import staged
from fusionpl.cli.running import is_main_process, quiet
from fusionpl.errors import FusionError
from fusionpl.evaluation.report import Report
from fusionpl.fusion.fuse import Fusion
from fusionpl.fusion.result import FusionResult
from fusionpl.models.lineage import Ancestor, ancestor, lineage, parents_section
from fusionpl.models.save import forget_places, library_of, write_card
from fusionpl.options import write_settings
from fusionpl.training.dashboard import log_models, log_report
from fusionpl.training.loggers import finish_loggers, make_loggers
from fusionpl.training.tasks import TASKS
from fusionpl.training.weights_and_biases import dashboard_name, open_run


def fuse(asked: Asked) -> None:
    """Fuses parents, or shows, checks or advises what the options say.

    Raises:
        FusionError: a user's mistake.
    """
    quiet()
    started, args, output = time.monotonic(), asked.args, asked.output
    fabric = _fabric(args.trainer)
    job = Job.of(asked, fabric.device if has_float64(fabric.device) else torch.device("cpu"))
    fusion = job.prepared(job.config)
    others = {name: job.prepared(config) for name, config in asked.presets.items()}
    for other in others.values():
        job.check_room(other)
    if args.dry_run:
        fusion = fusion.matched(job.calibration()) if fusion.matchings else fusion
        print(fusion.describe(), job.check_room(fusion), *(f"warning: {line}" for line in job.team.lines), sep="\n")
        return
    job.data.check_model(job.team.reference.module, job.team.reference.logits)
    if args.check:
        check(job)
        return
    if args.advise:
        print(*advised(job).lines, sep="\n")
        return
    job.check_room(fusion, output)
    if asked.alternatives and fabric.world_size > 1:
        raise FusionError(
            f"--compare {' '.join(asked.alternatives)} trains in one process, not in {fabric.world_size}; "
            "add --trainer.devices 1"
        )
    ancestors: list[Ancestor] = []
    if is_main_process():
        depths = " and ".join(dict.fromkeys(str(binding.depth) for binding in job.team.bindings))
        print(
            f"parents: {', '.join(job.parents)} ({job.team.binding.family.name}, {depths} blocks); "
            f"anchor: {job.team.reference.name}"
        )
        # Now, so that the card tells of the commits that are fused; a branch may move.
        ancestors = [ancestor(name, path) for name, path in job.parents.items()]
    loggers = make_loggers(
        args.logger, output, name=f"fuse {output.name}", job="fuse", group=dashboard_name(output), config=job.settings
    )
    with staged(output, args.overwrite) if is_main_process() else nullcontext(output) as folder:
        fabric.launch()
        open_run(loggers, folder)  # whose system metrics then show the fusion
        result, cost = _run(job, fusion, fabric, folder)
        made: dict[str, Made] = {}
        for name, other in others.items():
            compared, seconds = _run(job, other, fabric)
            made[name] = compared.model, seconds
        if not fabric.is_global_zero:
            return
        write_settings(folder, job.settings)
        if job.tokenizer is not None:
            job.tokenizer.save_pretrained(folder / "model")
            forget_places(folder / "model")
        alternatives = {name: partial(_alternative, job, name, cost.seconds) for name in asked.alternatives}
        report = measure(
            list(job.parents), job.load, result, cost, made, alternatives, job.data, job.device, job.settings,
            args.report,
        )  # fmt: skip
        report.save(folder / "report")
        command = command_section("fuse", asked.argv, PRESET)
        _write_card(folder / "model", job, result.config.strategy, ancestors, report, command, output.name)
    print(*(f"warning: {line}" for line in result.warnings), *result.notes, f"\n{report.table()}\n", sep="\n")
    log_report(loggers, report, output / "report")
    log_models(loggers, used=args.parents, made=output)
    finish_loggers(loggers)
    print(f"{output}: model/, report/report.html, maps.safetensors; {time.monotonic() - started:.0f} s")
    if args.push_to is not None:
        push_run(output, args.push_to, private=args.push_private)
    if TASKS[args.task].trains:
        print(f"next: python finetune.py --model {output}")


def _run(job: Job, fusion: Fusion, fabric: L.Fabric, output: Path | None = None) -> tuple[FusionResult, Cost]:
    """Fuses in the processes that are there, and says what it took; the first writes the model."""
    started, config, main = time.monotonic(), fusion.plan.config, fabric.is_global_zero
    result = fusion.run(
        job.data.calibration_dataloader(),
        output=output if main else None,
        unlabelled=job.data.unlabelled_dataloader() if config.refine.asked else None,
        augment=job.data.augmented,
        seed=job.args.seed,
        progress=progress_bar if main else no_progress,
    )
    reads_nothing = config.align.evidence == "weights" and config.refit.method == "none"
    blind = reads_nothing and not config.refine.asked
    return result, Cost(None if blind else "unlabelled data", time.monotonic() - started)


def _write_card(
    folder: Path, job: Job, strategy: str, ancestors: Sequence[Ancestor], report: Report, command: str, name: str
) -> None:
    figures = next((row.as_dict() for row in report.rows if row.name == "fused"), {})
    data = metadata(job.settings, figures, name) | lineage(ancestors, "merge") | {"tags": ["fusionpl", "merge"]}
    body = fused_card(report, list(job.parents), strategy, parents_section(ancestors), command)
    write_card(folder, library_of(job.team.reference.module), body, data)


def _alternative(job: Job, name: str, seconds: float, best: int, parents: Sequence[nn.Module]) -> Made:
    """What the fusion's time is good for otherwise."""
    print(f"{name}: the best parent for {seconds:.0f} s")
    if name == DISTILLED:
        return distilled(job, seconds, best, parents)
    given = {key: job.args.trainer[key] for key in ("accelerator", "precision")}
    return trained_on(job.data, seconds, given, parents[best])


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
