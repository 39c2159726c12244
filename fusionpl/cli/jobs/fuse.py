"""Align, average, evaluate, report."""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import Namespace
from torch import Tensor, nn
from tqdm import tqdm

from fusionpl.calibration.batches import batches
from fusionpl.calibration.cursor import CalibrationSet
from fusionpl.calibration.embeddings import embed
from fusionpl.calibration.forward import logits
from fusionpl.calibration.kept import Kept, budget
from fusionpl.calibration.network import Network
from fusionpl.cli.alternatives import TRAINED_ON
from fusionpl.cli.common import quiet
from fusionpl.cli.fuse import PRESET, Asked
from fusionpl.cli.jobs.alternative import alternative
from fusionpl.cli.jobs.cards import command_section, fused_card, metadata
from fusionpl.cli.jobs.data import common_tokenizer, data_module, follow
from fusionpl.cli.jobs.measuring import Cost, Made, measure
from fusionpl.cli.jobs.push import push_run
from fusionpl.cli.outputs import is_main_process, staged
from fusionpl.datamodules.base import FixedSplits
from fusionpl.datamodules.config import AUTO
from fusionpl.errors import FusionError
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import Needs
from fusionpl.families.family import VOCABULARY, Family, read_family
from fusionpl.families.proof import PROOF_TOLERANCE, allowed, permutation_error
from fusionpl.fusion.advice import ADVISED, Advice, advise
from fusionpl.fusion.config import FuseConfig, mixing_weights, resolve_anchor
from fusionpl.fusion.estimate import Estimate, estimate
from fusionpl.fusion.forms import folding_error
from fusionpl.fusion.fuse import check_parents, match_parents, plan_of, ready
from fusionpl.fusion.goal import settled, tied_alike
from fusionpl.fusion.kin import ALIKE, weights_alike
from fusionpl.fusion.plan import Plan, describe
from fusionpl.fusion.result import FusionResult
from fusionpl.fusion.team import open_parents
from fusionpl.fusion.units import trial_of
from fusionpl.models.lineage import Ancestor, ancestor, lineage, parents_section
from fusionpl.models.pipelines import check_tokenizers
from fusionpl.models.preprocessing import ImageProcessing
from fusionpl.models.save import forget_places, library_of, write_card
from fusionpl.models.tokenizers import load_tokenizer
from fusionpl.models.vocabulary import Vocabulary, load_parent
from fusionpl.training.dashboard import log_models, log_report
from fusionpl.training.fusion_callback import OTFusion
from fusionpl.training.loggers import finish_loggers, make_loggers
from fusionpl.training.tasks import TASKS
from fusionpl.training.weights_and_biases import dashboard_name, open_run


@dataclass(frozen=True)
class Job:
    """What a command line asks for, checked, with no weight read.

    Attributes:
        args: the options.
        settings: those that decide the result, as plain values.
        config: how to fuse.
        parents: short name -> where the parent comes from.
        networks: the parents.
        anchor: index of the anchor.
        lines: what a reader should know of the parents.
        data: to calibrate and test on.
        tokenizer: that the parents share, or None.
        family: the user's own, or None.
        presets: row -> another configuration to compare with.
        alternatives: what else to compare with, of ALTERNATIVES.
    """

    args: Namespace
    settings: dict[str, Any]
    config: FuseConfig
    parents: Mapping[str, str]
    networks: Sequence[Network]
    anchor: int
    lines: Sequence[str]
    data: FixedSplits
    tokenizer: Any
    family: Family | None
    presets: Mapping[str, FuseConfig]
    alternatives: Sequence[str]

    @classmethod
    def of(cls, asked: Asked) -> "Job":
        """Reads configurations of models.

        Raises:
            FusionError: a user's mistake.
        """
        args, config, parents, presets = asked.args, asked.config, asked.parents, asked.presets
        family, anchor = read_family(args.family), resolve_anchor(config, len(parents))
        reading = {"allow_pickle": args.allow_pickle, "family": family}
        opened = open_parents(list(parents.values()), list(parents), **reading)
        tokenizers = {name: load_tokenizer(path) for name, path in parents.items()}
        tokenizer = common_tokenizer(tokenizers, anchor)
        decreed = ImageProcessing(decreed=True) if getattr(args.data, "normalize", AUTO) != AUTO else None
        lines = match_parents(list(parents.values()), opened, anchor, decreed)
        networks = tied_alike([network for network, _ in opened])
        lines += check_parents(networks, list(parents.values()), anchor)
        config = settled(config, networks, anchor)
        presets = {name: settled(one, networks, resolve_anchor(one, len(parents))) for name, one in presets.items()}
        data = data_module(args.task, args.data, 0, tokenizer, args.parents)
        follow(data, networks[anchor].module, list(parents.values())[anchor])
        check_tokenizers(tokenizers, texts=data.texts())
        return cls(
            args, asked.settings, config, parents, networks, anchor, lines, data, tokenizer, family, presets,
            asked.alternatives,
        )  # fmt: skip

    def load(self, name: str) -> nn.Module:
        """A whole parent, with the anchor's vocabulary and its size and preparation of images."""
        axis = self.networks[self.anchor].binding.axes.get(VOCABULARY)
        vocabulary = Vocabulary(self.tokenizer, axis.size) if axis and self.tokenizer is not None else None
        like = self.networks[self.anchor].module
        model = load_parent(
            self.parents[name], vocabulary, like, processing=self.data.processing,
            allow_pickle=self.args.allow_pickle, family=self.family,
        )  # fmt: skip
        self.data.follow(model)
        return model

    def calibration(self) -> CalibrationSet:
        """The calibration set, in this process."""
        config = self.config.calibration
        return CalibrationSet(self.data.calibration_dataloader(config.batch_size), config, Kept(budget(config.memory)))

    def estimate(
        self, config: FuseConfig, plan: Plan, networks: Sequence[Network], goal: Network, device: torch.device
    ) -> Estimate:
        """What a fusion will take."""
        calibration, anchor = self.data.calibration_dataloader(config.calibration.batch_size), self.anchor_of(config)
        batch, samples = next(iter(calibration)), len(calibration.dataset)  # type: ignore[arg-type]  # all have a length
        return estimate(plan, networks, anchor, config, batch, samples, device, goal)

    def anchor_of(self, config: FuseConfig) -> int:
        """The anchor's index, from 0."""
        return resolve_anchor(config, len(self.parents))


def fuse(asked: Asked) -> None:
    """Fuses parents, or shows, checks or advises what the options say.

    Raises:
        FusionError: a user's mistake.
    """
    quiet()
    started = time.monotonic()
    job = Job.of(asked)
    names, args = list(job.parents), job.args
    networks, matchings = ready(job.networks, job.anchor, job.config)
    goal, plan = plan_of(networks, job.anchor, job.config, names)
    device, output = _device(args.trainer), asked.output
    job.data.check_reads(job.networks[job.anchor].module)
    for other in job.presets.values():
        anchor = job.anchor_of(other)
        level = ready(job.networks, anchor, other)[0]
        other_goal, other_plan = plan_of(level, anchor, other, names)
        needed = job.estimate(other, other_plan, level, other_goal, device)
        if not args.dry_run:
            needed.check(device, None)
    if not args.dry_run:
        job.data.check_model(job.networks[job.anchor].module, job.networks[job.anchor].logits)
    if args.dry_run and matchings:
        networks, matchings = ready(job.networks, job.anchor, job.config, job.calibration())
        goal, plan = plan_of(networks, job.anchor, job.config, names)
    bindings = [network.binding for network in networks]
    expected = job.estimate(job.config, plan, networks, goal, device)
    if args.dry_run:
        table = describe(plan, bindings, job.anchor, job.config, names, goal.binding)
        trial = trial_of(job.config, "classes" in bindings[job.anchor].axes)
        tried = job.estimate(trial, plan, networks, goal, device) if trial else None
        warned = [f"warning: {line}" for line in job.lines]
        print(table, *(one.told for one in matchings), expected.told(device, tried), *warned, sep="\n")
        return
    if args.check:
        _check(job)
        return
    if args.advise:
        print(*_advised(job).lines, sep="\n")
        return
    expected.check(device, output)
    ancestors: list[Ancestor] = []
    if is_main_process():
        print(
            f"parents: {', '.join(names)} ({bindings[0].family.name}, {_depths(job.networks)} blocks); "
            f"anchor: {names[job.anchor]}"
        )
        # Now, so that the card tells of the commits that are fused; a branch may move.
        ancestors = [ancestor(name, path) for name, path in job.parents.items()]
    loggers = make_loggers(
        args.logger, output, name=f"fuse {output.name}", job="fuse", group=dashboard_name(output), config=job.settings
    )
    with staged(output, args.overwrite) if is_main_process() else nullcontext(output) as folder:
        reading = {"names": names, "seed": args.seed, "allow_pickle": args.allow_pickle, "family": job.family}
        fusion = _Fusion(list(job.parents.values()), job.config, output=folder, progress=progress_bar, **reading)
        trainer = L.Trainer(callbacks=[fusion], **_launching(args.trainer))
        if job.alternatives and trainer.world_size > 1:
            raise FusionError(
                f"--compare {' '.join(job.alternatives)} trains in one process, not in {trainer.world_size}; "
                "add --trainer.devices 1"
            )
        open_run(loggers, folder)  # whose system metrics then show the fusion
        trainer.test(_Nothing(), datamodule=job.data, verbose=False)
        assert fusion.result is not None
        device = trainer.strategy.root_device
        others: dict[str, Made] = {}
        for name, other in job.presets.items():
            result, cost = _fused(OTFusion(fusion.parents, other, **reading), trainer)
            others[name] = result.model, cost
        if not trainer.is_global_zero:
            return
        job.data.trainer = None  # whose test data are shared out among the processes
        (folder / "config.yaml").write_text(yaml.safe_dump(job.settings, sort_keys=False))
        if job.tokenizer is not None:
            job.tokenizer.save_pretrained(folder / "model")
            forget_places(folder / "model")
        alternatives = {name: partial(_alternative, job, name, fusion.cost.seconds) for name in job.alternatives}
        report = measure(
            names, job.load, fusion.result, fusion.cost, others, alternatives, job.data, device, job.settings,
            args.report,
        )  # fmt: skip
        report.save(folder / "report")
        _write_card(folder / "model", job, ancestors, report, command_section("fuse", asked.argv, PRESET), output.name)
    for line in fusion.result.warnings:
        print(f"warning: {line}")
    for line in fusion.result.notes:
        print(line)
    print(f"\n{report.table()}\n")
    log_report(loggers, report, output / "report")
    log_models(loggers, used=args.parents, made=output)
    finish_loggers(loggers)
    print(f"{output}: model/, report/report.html, maps.safetensors; {time.monotonic() - started:.0f} s")
    if args.push_to is not None:
        push_run(output, args.push_to, private=args.push_private)
    if TASKS[args.task].trains:
        print(f"next: python finetune.py --model {output}")


def _write_card(folder: Path, job: Job, ancestors: Sequence[Ancestor], report: Report, command: str, name: str) -> None:
    figures = next((row.as_dict() for row in report.rows if row.name == "fused"), {})
    data = metadata(job.settings, figures, name) | lineage(ancestors, "merge") | {"tags": ["fusionpl", "merge"]}
    body = fused_card(report, list(job.parents), job.config.strategy, parents_section(ancestors), command)
    write_card(folder, library_of(job.networks[job.anchor].module), body, data)


class _Fusion(OTFusion):
    """Fuses in the processes that a Trainer starts, and leaves the result on disk."""

    cost: Cost

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Fuses."""
        self.result, self.cost = _fused(self, trainer)


def _fused(fusion: OTFusion, trainer: L.Trainer) -> tuple[FusionResult, Cost]:
    """Fuses, and says what it took."""
    started = time.monotonic()
    result = fusion.fuse(trainer)
    reads_nothing = fusion.config.align.evidence == "weights" and fusion.config.refit.method == "none"
    blind = reads_nothing and not fusion.config.refine.asked
    return result, Cost(None if blind else "unlabelled data", time.monotonic() - started)


def _alternative(job: Job, name: str, seconds: float, best: nn.Module, parents: Sequence[nn.Module]) -> Made:
    """What the fusion's time is good for otherwise."""
    print(f"{name}: the best parent for {seconds:.0f} s")
    given = {key: job.args.trainer[key] for key in ("accelerator", "precision")}
    trained = alternative(
        name, best, parents, job.data, samples=job.config.calibration.samples, seconds=seconds, trainer_args=given
    )
    needs: Needs = "labels" if name == TRAINED_ON else "unlabelled data"
    return trained.model, Cost(needs, trained.seconds, trained.steps)


class _Nothing(L.LightningModule):
    """A module that a Trainer has nothing to do with."""

    def test_step(self, batch: Any, index: int) -> None:
        """Is never called."""


def _launching(options: Namespace) -> dict[str, Any]:
    """Trainer arguments that start the processes and then run no batch."""
    quietly = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    found = {**options.as_dict(), **quietly, "limit_test_batches": 0}
    return {**found, "strategy": "ddp"} if options.strategy == "fsdp" else found  # no weights to shard


def _depths(networks: Sequence[Network]) -> str:
    return " and ".join(dict.fromkeys(str(network.binding.depth) for network in networks))


def _device(options: Namespace) -> torch.device:
    """Where a Trainer with these options fuses: on a GPU if there is one, and the options don't name the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and options.accelerator != "cpu" else "cpu")


def progress_bar(steps: Iterable[Any], label: str) -> Iterable[Any]:
    """A bar on a terminal, nothing elsewhere."""
    bar: Iterable[Any] = tqdm(steps, desc=label, leave=False, dynamic_ncols=True, disable=None)
    return bar


def _advised(job: Job) -> Advice:
    names, size = list(job.parents), job.config.calibration.batch_size
    few = replace(job.config.calibration, samples=min(ADVISED, job.config.calibration.samples))
    samples = list(batches(job.data.calibration_dataloader(size), few))
    alike = max(
        weights_alike(job.networks[job.anchor], other) or 0.0
        for at, other in enumerate(job.networks)
        if at != job.anchor
    )
    weights = mixing_weights(job.config.weights, len(names))
    return advise([job.load(name) for name in names], names, weights, samples, base=alike >= ALIKE, family=job.family)


def _check(job: Job) -> None:
    batch, pooling = next(iter(job.data.calibration_dataloader(16))), job.data.pooling

    def shown(model: nn.Module) -> Tensor:
        """Its outputs, or the inner products of its embeddings, whose units may be renumbered."""
        if pooling is None:
            return logits(model, batch)
        embedded = embed(model, batch, pooling)
        return embedded @ embedded.T

    print(f"what may be done to the units of {job.networks[job.anchor].name}, and keeps its function:\n")
    print(allowed(job.networks[job.anchor].binding), end="\n\n")
    for name in job.parents:
        model = job.load(name)
        with torch.inference_mode():
            size = float(shown(model).abs().max())
        error = permutation_error(model, shown, family=job.family)
        if not error <= PROOF_TOLERANCE * size:
            raise FusionError(
                f"{name}: moving its units at random changes outputs by {error:.1e} (outputs are up to {size:.1f}); "
                "its family file does not describe this model"
            )
        change, size, what = folding_error(model, shown, family=job.family)
        if not change <= PROOF_TOLERANCE * size:
            raise FusionError(
                f"{name}: folding {what} changes outputs by {change:.1e} (outputs are up to {size:.1f}), so its "
                "canonical form is not the same function; use strategy transport, or mend its family file"
            )
        print(f"{name}: ok; renumbering all units at random changes outputs by {error:.1e} (outputs up to {size:.1f})")
