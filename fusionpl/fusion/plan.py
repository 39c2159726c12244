"""What a fusion will do, before any weight is read: `fuse.py --dry-run` prints it, `fuse` carries it out."""

from dataclasses import dataclass
from functools import cached_property

from fusionpl.alignment.config import AlignConfig
from fusionpl.alignment.problem import Observed, Problem
from fusionpl.calibration.moments import Key
from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.errors import FusionError
from fusionpl.families.axes import Binding, Slot, section_of
from fusionpl.families.family import TAIL
from fusionpl.fusion.config import FuseConfig, mixing_weights
from fusionpl.fusion.groups import LinearGroup, groups_of
from fusionpl.fusion.methods import METHODS
from fusionpl.fusion.target import target_of
from fusionpl.fusion.team import Team


@dataclass(frozen=True)
class SectionPlan:
    """What happens in one section.

    Attributes:
        name: of the section.
        problems: the alignment problems that are solved here.
        keys: the activations that they compare.
        magnitudes: the anchor's axes whose mean absolute activation is needed.
        groups: what is fitted afterwards.
    """

    name: str
    problems: tuple[Problem, ...]
    keys: tuple[Key, ...]
    magnitudes: tuple[str, ...]
    groups: tuple[LinearGroup, ...]

    @property
    def observes(self) -> bool:
        """Whether the parents have to be run through the section for what they show there."""
        return bool(self.keys or self.magnitudes or self.groups)


@dataclass(frozen=True)
class Plan:
    """The work of a fusion, in order.

    Attributes:
        config: what is asked for, with nothing left to `auto` but `units`, which the data decide.
        weights: one number a parent, summing to 1.
        target: the network that is made: the anchor, or one whose parameters are still to come.
        whole: problems that look at all sections; they are solved first.
        sections: stem, blocks, tail.
        keep: parameters that stay the anchor's.
    """

    config: FuseConfig
    weights: tuple[float, ...]
    target: SectionedModel
    whole: tuple[Problem, ...]
    sections: tuple[SectionPlan, ...]
    keep: frozenset[str]

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All alignment problems."""
        return (*self.whole, *(problem for section in self.sections for problem in section.problems))

    @cached_property
    def problem_of(self) -> dict[str, Problem]:
        """Axis -> the problem that gives it its map."""
        return {axis: problem for problem in self.problems for axis in problem.axes}

    @property
    def survey(self) -> tuple[Key, ...]:
        """The activations that are compared before any section is fused."""
        return tuple(dict.fromkeys(key for problem in self.whole for key in problem.keys))

    @property
    def together(self) -> dict[str, str]:
        """Joins whose units are multiplied with those of all parents -> the first axis of their stream."""
        return {join: problem.axes[0] for problem in self.whole for join in problem.together}

    @property
    def looks(self) -> bool:
        """Whether the parents are walked through alone, before any section is fused."""
        return bool(self.survey or self.together)

    @property
    def fits(self) -> bool:
        """Whether anything is fitted, so that the fused network is run."""
        return any(section.groups for section in self.sections)

    @property
    def observes(self) -> bool:
        """Whether there is anything to run the parents for."""
        return self.looks or any(section.observes for section in self.sections)


def make_plan(team: Team, config: FuseConfig) -> Plan:
    """The plan of a fusion.

    Args:
        team: parents that fit together, in the form in which the method takes them.
        config: what is asked for: see `resolve`.

    Raises:
        FusionError: options that don't fit the family, the widths or the head counts.
    """
    weights = tuple(mixing_weights(config.weights, len(team)))
    if config.strategy == "head":  # which looks at whole models
        return Plan(config, weights, team.reference, (), (), frozenset())
    method = METHODS[config.strategy]
    for binding, name in zip(team.bindings, team.names, strict=True):
        if reason := method.hindrance(binding, config):
            raise FusionError(f"{name}: {reason}; use {method.instead}")
    target = target_of(team.reference, config)
    problems = method.problems(target.binding, config)
    keep = anchor_only(target.binding, config.align)
    sections = []
    for name in target.binding.sections:
        own = tuple(problem for problem in problems if not problem.whole and problem.section == name)
        magnitudes = (axis for problem in problems for axis in problem.magnitudes if section_of(axis) == name)
        sections.append(
            SectionPlan(
                name,
                own,
                keys=tuple(dict.fromkeys(key for problem in own for key in problem.keys)),
                magnitudes=tuple(dict.fromkeys(magnitudes)),
                groups=groups_of(target.binding, name, keep) if config.refit.method != "none" else (),
            )
        )
    whole = tuple(problem for problem in problems if problem.whole)
    plan = Plan(config, weights, target, whole, tuple(sections), keep)
    for problem in plan.problems:
        problem.check(observed_of(team, plan))
    return plan


def observed_of(team: Team, plan: Plan) -> Observed:
    """The parents beside the network that is made, before anything has been seen of them."""
    return Observed(
        parents=team.bindings, target=plan.target.binding, anchor=team.anchor, weights=plan.weights,
        config=plan.config.align, device=team.reference.device, missing=team.missing,
        problems=plan.problem_of,
    )  # fmt: skip


def remarks(team: Team, plan: Plan) -> list[str]:
    """What a reader should know of how these parents are fused, a line each."""
    if plan.config.strategy == "head":
        return []
    parents = dict(zip(team.names, team.bindings, strict=True))
    return METHODS[plan.config.strategy].remarks(plan.problems, parents, observed_of(team, plan))


def anchor_only(binding: Binding, config: AlignConfig) -> frozenset[str]:
    """The parameters that `align.embeddings` and `align.classifier` leave to the anchor."""
    stem = {slot.parameter for slot in binding.slots if slot.section in binding.ends[:-1] and _within(binding, slot)}
    classifier = {
        slot.parameter
        for slot in binding.slots
        if slot.section == TAIL
        and all(axis in binding.family.fixed for axis, reads in zip(slot.axes, slot.reads, strict=True) if not reads)
    }
    return frozenset((set() if config.embeddings else stem) | (set() if config.classifier else classifier))


def _within(binding: Binding, slot: Slot) -> bool:
    """Whether a slot has no axis of another stack: that of a stem also ends the stack before it."""
    own = binding.stack_of[slot.section]
    return all(binding.stack_of.get(section_of(axis), own) == own for axis in slot.axes if axis)


def describe(plan: Plan, team: Team) -> str:
    """A table of axes with their sizes (parents in order, and of the fused network where it is not like the anchor),
    and how each gets its map."""
    config, reference, anchor = plan.config, plan.target.binding, team.reference
    bindings = team.bindings
    how = "one stream for all parents"
    if config.units == "auto":
        how += "; whose units, the calibration set decides"
    if config.strategy == "head":
        return f"{reference.family.name}, {reference.depth} blocks; one parent, its head fitted to what all predict"
    if config.strategy == "transport":
        how = f"{_solver(config.align)}, {config.align.metric} cost / {config.align.normalize}"
    header = (
        f"{reference.family.name}, {reference.depth} blocks, {len(reference.slots)} parameter slots on "
        f"{len(reference.free)} free axes; anchor: {anchor.name}; {how}"
        + (f"; refit: {config.refit.method}" if config.refit.method != "none" else "")
    )
    rows = [("axis", "units", "heads", "map")]
    for name in reference.free:
        axes = [binding.axes[name] for binding in bindings]
        own, like = reference.axes[name], anchor.binding.axes[name]
        sizes = " / ".join(dict.fromkeys(str(axis.size) for axis in axes))
        heads = " / ".join(dict.fromkeys(str(axis.heads) for axis in axes))
        if own.size != like.size:
            sizes, heads = f"{sizes} -> {own.size}", f"{heads} -> {own.heads}"
        summary = plan.problem_of[name].summary(name, reference)
        rows.append((name, sizes, heads if max(axis.heads for axis in (*axes, own)) > 1 else "", summary))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    fixed = ", ".join(f"{axis.name} ({axis.size})" for axis in reference.axes.values() if axis.fixed)
    return "\n".join([header, "", *lines, "", f"fixed: {fixed}"])


def _solver(align: AlignConfig) -> str:
    return f"{align.solver} {align.reg:g}" if align.solver == "sinkhorn" else align.solver
