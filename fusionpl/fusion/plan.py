"""What a fusion will do, before any weight is read: `fuse.py --dry-run` prints it, the sweep carries it out."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

from fusionpl.alignment.config import AlignConfig
from fusionpl.alignment.joint import ChosenUnits, JointStream, check_choice, joint_problems
from fusionpl.alignment.problem import Problem
from fusionpl.alignment.problems import problems
from fusionpl.calibration.moments import Key
from fusionpl.errors import FusionError
from fusionpl.families import TAIL, Axis, Binding, Slot, inseparable, section_of, unrotatable
from fusionpl.fusion.config import FuseConfig
from fusionpl.fusion.stages import Stage, stages

# What to use where a stream may not be rotated.
_INSTEAD = {
    "transport": "align.stream transport with align.residual tie and align.solver assignment",
    "joint": "strategy transport",
}


@dataclass(frozen=True)
class SectionPlan:
    """What happens in one section.

    Attributes:
        name: of the section.
        problems: the alignment problems that are solved here.
        keys: the activations that they compare.
        magnitudes: the anchor's axes whose mean absolute activation is needed.
        stages: what is fitted afterwards.
    """

    name: str
    problems: tuple[Problem, ...]
    keys: tuple[Key, ...]
    magnitudes: tuple[str, ...]
    stages: tuple[Stage, ...]

    @property
    def observes(self) -> bool:
        """Whether the parents have to be run through the section for what they show there."""
        return bool(self.keys or self.magnitudes or self.stages)


@dataclass(frozen=True)
class Plan:
    """The work of a fusion, in order.

    Attributes:
        whole: problems that look at all sections; they are solved first.
        sections: stem, blocks, tail.
        keep: parameters that stay the anchor's.
    """

    whole: tuple[Problem, ...]
    sections: tuple[SectionPlan, ...]
    keep: frozenset[str]

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All alignment problems."""
        return (*self.whole, *(problem for section in self.sections for problem in section.problems))

    @property
    def survey(self) -> tuple[Key, ...]:
        """The activations that are compared before any section is fused."""
        return tuple(dict.fromkeys(key for problem in self.whole for key in problem.keys))

    @property
    def together(self) -> dict[str, str]:
        """Joins whose units are multiplied with those of all parents -> the first axis of their stream."""
        streams = [problem for problem in self.whole if isinstance(problem, JointStream)]
        return {join: stream.axes[0] for stream in streams for join in stream.joins}

    @property
    def looks(self) -> bool:
        """Whether the parents are walked through alone, before any section is fused."""
        return bool(self.survey or self.together)

    @property
    def fits(self) -> bool:
        """Whether anything is fitted, so that the fused network is run."""
        return any(section.stages for section in self.sections)

    @property
    def observes(self) -> bool:
        """Whether there is anything to run the parents for."""
        return self.looks or any(section.observes for section in self.sections)


def make_plan(
    bindings: Sequence[Binding],
    anchor: int,
    config: FuseConfig,
    names: Sequence[str],
    goal: Binding | None = None,
    idle: Sequence[Set[str]] | None = None,
) -> Plan:
    """The plan of a fusion.

    Args:
        bindings: of the parents, which fit together.
        anchor: index of the anchor.
        config: what is asked for.
        names: how messages call the parents.
        goal: of the fused network, where it is not like the anchor.
        idle: for each parent, the blocks that it has not; None where all have all.

    Raises:
        FusionError: options that don't fit the family, the widths or the head counts.
    """
    reference = goal or bindings[anchor]
    if config.strategy == "head":  # which looks at whole models
        return Plan((), (), frozenset())
    if config.canonical:
        hindered = inseparable if config.strategy == "joint" else unrotatable
        for binding, name in zip(bindings, names, strict=True):
            if reason := hindered(binding):
                raise FusionError(f"{name}: {reason}; use {_INSTEAD[config.strategy]}")
    if config.strategy == "joint":
        found = joint_problems(reference, even=config.units == "even")
    else:
        found = problems(reference, config.align)
    for problem in found:
        if isinstance(problem, ChosenUnits):
            there = [problem.section not in blocks for blocks in idle] if idle else [True] * len(bindings)
            check_choice(problem, bindings, anchor, reference, there)
        for index, binding in enumerate(bindings):
            if index != anchor:
                problem.check(binding, reference, config.align)
    keep = anchor_only(reference, config.align)
    sections = []
    for name in reference.sections:
        own = tuple(problem for problem in found if not problem.whole and problem.section == name)
        sections.append(
            SectionPlan(
                name,
                own,
                keys=tuple(dict.fromkeys(key for problem in own for key in problem.keys)),
                magnitudes=tuple(
                    dict.fromkeys(axis for problem in found for axis in problem.magnitudes if section_of(axis) == name)
                ),
                stages=stages(reference, name, keep) if config.refit.method != "none" else (),
            )
        )
    return Plan(tuple(problem for problem in found if problem.whole), tuple(sections), keep)


def left_out(
    plan: Plan, bindings: Sequence[Binding], goal: Binding, names: Sequence[str], idle: Sequence[Set[str]]
) -> list[str]:
    """A line for each parent none of whose heads can be taken: fusion into one stream takes heads as they are.

    Args:
        plan: of the fusion.
        bindings, names, idle: see `make_plan`.
        goal: the fused network's binding.
    """
    choices = [problem for problem in plan.problems if isinstance(problem, ChosenUnits) and problem.heads]
    lines = []
    for binding, name, blocks in zip(bindings, names, idle, strict=True):
        here = [problem for problem in choices if problem.section not in blocks]
        out = [problem for problem in here if not problem.gives(binding, goal)]
        if out:
            theirs, ours = (_heads_of(one.axes[out[0].axes[0]]) for one in (binding, goal))
            where = "" if len(out) == len(here) else f" in {len(out)} of {len(here)} blocks"
            lines.append(
                f"{name} has heads of {theirs}, the fused model of {ours}: its stream and its other units are taken, "
                f"and none of its heads{where}"
            )
    return lines


def _heads_of(axis: Axis) -> str:
    rotated = f", {2 * axis.pairs} of them rotated" if axis.pairs else ""
    return f"{axis.width} units{rotated}" + (f", {axis.members} to a key-value head" if axis.members > 1 else "")


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


def describe(
    plan: Plan,
    bindings: Sequence[Binding],
    anchor: int,
    config: FuseConfig,
    names: Sequence[str],
    goal: Binding | None = None,
) -> str:
    """A table of axes with their sizes (parents in order, and of the fused network where it is not like the anchor),
    and how each gets its map."""
    reference = goal or bindings[anchor]
    how = "one stream for all parents"
    if config.units == "auto":
        how += "; whose units, the calibration set decides"
    if config.strategy == "head":
        return f"{reference.family.name}, {reference.depth} blocks; one parent, its head fitted to what all predict"
    if config.strategy == "transport":
        how = f"{_solver(config.align)}, {config.align.metric} cost / {config.align.normalize}"
    header = (
        f"{reference.family.name}, {reference.depth} blocks, {len(reference.slots)} parameter slots on "
        f"{len(reference.free)} free axes; anchor: {names[anchor]}; {how}"
        + (f"; refit: {config.refit.method}" if config.refit.method != "none" else "")
    )
    problem_of = {axis: problem for problem in plan.problems for axis in problem.axes}
    rows = [("axis", "units", "heads", "map")]
    for name in reference.free:
        axes = [binding.axes[name] for binding in bindings]
        own, like = reference.axes[name], bindings[anchor].axes[name]
        sizes = " / ".join(dict.fromkeys(str(axis.size) for axis in axes))
        heads = " / ".join(dict.fromkeys(str(axis.heads) for axis in axes))
        if own.size != like.size:
            sizes, heads = f"{sizes} -> {own.size}", f"{heads} -> {own.heads}"
        told = problem_of[name].told(name, reference)
        rows.append((name, sizes, heads if max(axis.heads for axis in (*axes, own)) > 1 else "", told))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    fixed = ", ".join(f"{axis.name} ({axis.size})" for axis in reference.axes.values() if axis.fixed)
    return "\n".join([header, "", *lines, "", f"fixed: {fixed}"])


def _solver(align: AlignConfig) -> str:
    return f"{align.solver} {align.reg:g}" if align.solver == "sinkhorn" else align.solver
