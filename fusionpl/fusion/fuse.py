"""fuse(): the whole algorithm, from parents to one model.

Parents are opened and brought to one form, and whole networks are surveyed. Then one walk goes through all of them
section by section (the stem, each block, the tail): what the parents show there is observed, the maps of their units
are solved for, the aligned parents are averaged, the average is refitted, and written.
"""

import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fusionpl.alignment.maps import Maps, Plans
from fusionpl.alignment.problem import solve_all
from fusionpl.calibration.batches import Progress, by_owner, no_progress
from fusionpl.calibration.cursor import CalibrationSet, Cursor
from fusionpl.calibration.kept import Kept, budget
from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.families.family import Family
from fusionpl.fusion import units
from fusionpl.fusion.best_parent import keep_best_parent
from fusionpl.fusion.config import FuseConfig
from fusionpl.fusion.depth import Matching
from fusionpl.fusion.fitting import Fit, Section
from fusionpl.fusion.forms import check_forms
from fusionpl.fusion.methods.refinement import refine
from fusionpl.fusion.needs import Needs, needs_of
from fusionpl.fusion.parents import AlignedParent
from fusionpl.fusion.pixels import said
from fusionpl.fusion.plan import Plan, describe, make_plan, remarks
from fusionpl.fusion.prepare import check_taught, in_form, open_team
from fusionpl.fusion.refit import Penalties, advance, refit_section
from fusionpl.fusion.result import FusionResult, InMemory, Writer, unconverged
from fusionpl.fusion.saving import save, writer_of
from fusionpl.fusion.sections import aligned_parents, anchored, average_section, completed, observed, wanted_in
from fusionpl.fusion.survey import LOOKED_AT, Survey, survey_streams
from fusionpl.fusion.target import resolve
from fusionpl.fusion.teaching import Augment
from fusionpl.fusion.team import Parent, Team
from fusionpl.fusion.walk import Walk
from fusionpl.models.preprocessing import ImageProcessing


def fuse(
    parents: Sequence[Parent],
    calibration: Iterable[Any],
    config: FuseConfig | None = None,
    *,
    names: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    output: str | Path | None = None,
    unlabelled: Iterable[Any] | None = None,
    augment: Augment | None = None,
    processing: ImageProcessing | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
    family: Family | str | Path | None = None,
    progress: Progress = no_progress,
) -> FusionResult:
    """Aligns the parents to the anchor and averages them into one model.

    Source: Imfeld et al., "Transformer Fusion with Optimal Transport", ICLR 2024.

    Args:
        parents: two or more models of one family and set of classes, or anything `load_model` takes; widths and depths
            may differ. Models are used where they are; of what is named, one block at a time is in memory.
        calibration: any iterable of batches (mapping of model inputs, or image tensor [B, C, H, W]); labels are never
            read. With `align.evidence: weights` it may be empty. It is iterated once. A list with an iterable for each
            parent says whose data they are: on these, its predictions alone are what the fused model is fitted to.
        config: see FuseConfig.
        names: how messages call the parents.
        device: where parents that are named are fused; by default where the others are, or the CPU.
        output: a run folder that gets model/, maps.safetensors and config.yaml; where the anchor is named, the fused
            model is written into it block by block, and loaded only when `FusionResult.model` is asked for. With
            `labels: separate` it gets a model-NAME/ for each parent.
        unlabelled: a DataLoader of more samples that learned refinement teaches on, beside the calibration set: its
            data set and collate function are used, in an order of its own; labels are never read. Or a list of one for
            each parent.
        augment: changes a batch of model inputs at random, from torch's global RNG, where `refine.augment` asks for it.
        processing: how images of `calibration` are prepared, and the fused model takes them; by default as the anchor's
            folder says. A parent that is named, and whose folder says another mean or deviation, has its patch
            embedding rewritten for it.
        seed: decides what learned refinement draws: the order of the samples, augmentation, dropout; nothing else is
            random.
        allow_pickle: see `load_model`.
        family: what the parents are, where the library does not say (or not well): a YAML file as
            docs/families.md explains, or a Family.
        progress: wraps loops for a progress bar.

    Returns:
        FusionResult; its model, or its models, are new, the parents are untouched.

    Raises:
        FusionError: parents that do not fit together, a family that does not fit them, NaN weights, an empty
            calibration set, options that don't fit, a device that is not there.
    """
    prepared = prepare(
        parents, config, names=names, device=device, processing=processing, allow_pickle=allow_pickle, family=family
    )
    return prepared.run(
        calibration, output=output, unlabelled=unlabelled, augment=augment, seed=seed, progress=progress
    )


def prepare(
    parents: Sequence[Parent],
    config: FuseConfig | None = None,
    *,
    names: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    processing: ImageProcessing | None = None,
    allow_pickle: bool = False,
    family: Family | str | Path | None = None,
) -> "Fusion":
    """Parents that are opened and compared, and what will be done with them, with no weight read where their library
    allows that.

    Args:
        parents, config, names, device, processing, allow_pickle, family: see `fuse`.

    Returns:
        A fusion that describes itself, says what memory and disk it needs, and runs; it can run again.

    Raises:
        FusionError: as `fuse`, of all that needs no calibration data.
    """
    config = config or FuseConfig()
    team = open_team(
        parents, config, names=names, device=device, processing=processing, allow_pickle=allow_pickle, family=family
    )
    return prepare_team(team, config, processing)


def prepare_team(team: Team, config: FuseConfig, processing: ImageProcessing | None = None) -> "Fusion":
    """What will be done with parents that are opened with the same anchor: see `prepare`."""
    check_taught(team, config)
    config = resolve(config, team)
    ready, matchings = in_form(team, config)
    processing = processing or said(team.sources[team.anchor], team.reference)
    return Fusion(ready, make_plan(ready, config), tuple(matchings), processing)


@dataclass(frozen=True)
class Fusion:
    """A fusion that is prepared.

    Attributes:
        team: the parents, in the form in which their method takes them.
        plan: what will be done.
        matchings: for parents of another depth than the fused model's, which of their blocks stand for which of its.
        processing: how the fused model takes images.
    """

    team: Team
    plan: Plan
    matchings: tuple[Matching, ...]
    processing: ImageProcessing | None

    def describe(self) -> str:
        """What will be done: a table of axes, and how each gets its map."""
        return "\n".join([describe(self.plan, self.team), *(matching.summary for matching in self.matchings)])

    def needs(self, batch: Any, samples: int | Sequence[int], device: torch.device) -> Needs:
        """The memory and disk that it needs.

        Args:
            batch: of the calibration set.
            samples: in the calibration set, or in that of each parent.
            device: where it will run.
        """
        return needs_of(self.team, self.plan, batch, samples, device)

    def matched(self, data: CalibrationSet) -> "Fusion":
        """With the blocks of parents of different depth matched by what they do to the data."""
        if not self.matchings:
            return self
        team, matchings = in_form(self.team, self.plan.config, data)
        return replace(self, team=team, matchings=tuple(matchings))

    def run(
        self,
        calibration: Iterable[Any],
        *,
        output: str | Path | None = None,
        unlabelled: Iterable[Any] | None = None,
        augment: Augment | None = None,
        seed: int = 0,
        progress: Progress = no_progress,
    ) -> FusionResult:
        """Carries it out; see `fuse`."""
        config, folder = self.plan.config, None if output is None else Path(output)
        samples = by_owner(calibration, len(self.team))
        more = None if unlabelled is None else by_owner(unlabelled, len(self.team))
        kept = Kept(budget(config.calibration.memory, self.team.reference.device))
        observes = config.refine.asked or config.strategy == "head" or self.plan.observes
        data = CalibrationSet(samples, config.calibration, kept) if observes else None
        fusion = self if data is None else self.matched(data)
        walk, heads = Walk(fusion.team, data), fusion.team.heads
        survey = Survey(fusion.team.kind, [{} for _ in fusion.team.networks], heads=heads)
        if data is not None:
            check_forms(fusion.team.networks, config, data)
            survey = survey_streams(walk, self.plan, kept, progress)
        if config.strategy == "head":
            result = keep_best_parent(walk, self.plan, survey)
        else:
            plan, notes = choose_units(walk, self.plan, survey, progress)
            result = replace(make_model(walk, plan, survey, folder, progress), notes=notes)
        if config.refine.asked:
            taught = refine(
                result.network, result.binding, result.parents, walk.data, result.config,
                survey.votings(self.plan.weights), more=more, augment=augment, seed=seed, apart=survey.apart,
                progress=progress,
            )  # fmt: skip
            result = replace(result, teaching=taught, refitted=result.network, notes=[*result.notes, taught.summary])
        result = replace(
            result,
            heads=heads,
            matchings=fusion.matchings,
            notes=[*(matching.summary for matching in fusion.matchings), *survey.notes, *result.notes],
            warnings=[
                *fusion.team.lines,
                *survey.warnings,
                *(matching.warning for matching in fusion.matchings if matching.warning),
                *remarks(fusion.team, self.plan),
                *unconverged(result.parents),
            ],
        )
        if folder is not None:
            save(result, fusion.team, self.processing, folder)
        return result


def choose_units(walk: Walk, plan: Plan, survey: Survey, progress: Progress = no_progress) -> tuple[Plan, list[str]]:
    """The plan with nothing left to `units auto`, and a line that says why.

    Args:
        walk: the parents.
        plan: of the fusion.
        survey: what is known of the parents.
        progress: wraps the sections of trials.
    """
    if plan.config.strategy != "joint":
        return plan, []
    configs, notes = units.candidates(plan.config, survey.share, walk.data.samples)
    plans = [plan if config == plan.config else make_plan(walk.team, config) for config in configs]
    if len(plans) == 1:
        return plans[0], notes
    few, distances = walk.head(LOOKED_AT), []
    for candidate in plans:
        kept = Kept(walk.data.kept.limit)
        _, fused = fuse_sections(few, candidate, survey, InMemory(candidate.target, kept), kept, progress, trial=True)
        assert fused is not None  # one stream is refitted
        distances.append(units.distances_of(few, fused, *survey.votings(candidate.weights)))
    clear, line = units.nearer(*distances)
    return plans[0 if clear else 1], [line]


def make_model(
    walk: Walk, plan: Plan, survey: Survey, folder: Path | None, progress: Progress = no_progress
) -> FusionResult:
    """Fuses section by section, into a run folder or in memory; nothing half written is left.

    Args:
        walk: the parents before the stem.
        plan: what to do.
        survey: what is known of whole networks.
        folder: see `fuse`.
        progress: wraps the sections.
    """
    maps = Kept(budget(plan.config.calibration.memory, walk.team.reference.device))
    writer = writer_of(walk.team, plan, folder, Kept(sys.maxsize))
    with closing(writer):
        parents, _ = fuse_sections(walk, plan, survey, writer, maps, progress)
        writer.finish()
    return FusionResult(writer, parents, walk.team.anchor, plan.target, plan.config, plan.keep)


def fuse_sections(
    walk: Walk,
    plan: Plan,
    survey: Survey,
    writer: Writer,
    kept: Kept,
    progress: Progress = no_progress,
    *,
    trial: bool = False,
) -> tuple[list[AlignedParent], Cursor | None]:
    """The walk that fuses: for each section observe, solve, average, refit, write.

    Args:
        walk: the parents before the stem.
        plan: what to do.
        survey: what is known of whole networks.
        writer: takes the fused parameters.
        kept: where maps are kept.
        progress: wraps the sections.
        trial: whether held-out samples are left out of all fits, so that the fusion can be judged by them.

    Returns:
        The parents with their maps; and the fused network where it is run, which then stands before the tail.
    """
    target, device = plan.target, walk.team.reference.device
    fused = SectionedModel(
        target.module, target.binding, "the fused model", read=writer.read, device=device, float32=True
    )
    fit = None
    if plan.fits:
        votings, joint = survey.votings(plan.weights), plan.config.strategy == "joint"
        fit = Fit(Cursor(fused, walk.data, "fused"), walk.data, votings, survey.apart, joint, trial)
    wanted = [wanted_in(section, plan) for section in plan.sections]
    others = any(each.keys or each.targets for each in wanted)
    last = max((at for at, section in enumerate(plan.sections) if section.observes), default=-1)
    fitted = max((at for at, section in enumerate(plan.sections) if section.groups), default=-1)
    penalties: Penalties = {}
    magnitudes: dict[str, torch.Tensor] = {}
    plans = Plans(kept)
    maps = [Maps(plans) for _ in walk.team.networks]
    with walk.at_work():
        maps = solve_all(plan.whole, observed(walk, plan, survey), maps)
        for at, section in enumerate(progress(plan.sections, "try" if trial else "fuse")):
            states = walk.states(section.name)
            shown = walk.observe(wanted[at], states, others=others) if at <= last else None
            magnitudes |= shown.magnitudes if shown else {}
            maps = solve_all(section.problems, observed(walk, plan, survey, states, shown, magnitudes), maps)
            del shown  # a fit needs the memory
            parents = aligned_parents(walk, plan, maps)
            state = average_section(section.name, walk, plan, parents, states)
            if fit is not None and at <= fitted:
                whole = completed(section.name, state, fused, writer)
                whole, penalties = refit_section(
                    fit, Section(section.name, whole, parents, states), section.groups, penalties
                )
                if at < fitted:
                    advance(fit, Section(section.name, whole, parents, states, section.groups))
                walk.data.targets.clear()
                state = anchored(whole, state, walk)
            writer.write(state)
            del states, state  # before the next section is read
    return aligned_parents(walk, plan, maps), None if fit is None else fit.cursor
