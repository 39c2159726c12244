"""One walk through the parents and the fused network, section by section: observe, align, average, refit, write."""

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fusionpl.alignment.aligner import Aligner
from fusionpl.alignment.evidence import ActivationEvidence, Evidence, WeightEvidence
from fusionpl.alignment.joint import ChosenUnits, choose, joint_stream
from fusionpl.alignment.problem import Problem
from fusionpl.calibration.batches import Progress
from fusionpl.calibration.flow import CalibrationSet, Flow
from fusionpl.calibration.forward import eval_mode
from fusionpl.calibration.kept import Kept
from fusionpl.calibration.moments import Key
from fusionpl.calibration.network import Network
from fusionpl.calibration.observe import Statistics, Wanted, observe
from fusionpl.families import VOCABULARY, State, copy_rows, in_float32, section_of
from fusionpl.fusion.average import averaged
from fusionpl.fusion.config import FuseConfig
from fusionpl.fusion.parents import AlignedParent
from fusionpl.fusion.plan import Plan, SectionPlan
from fusionpl.fusion.refit import Refit
from fusionpl.fusion.result import Sink
from fusionpl.fusion.survey import Survey
from fusionpl.models.labels import kind_of
from fusionpl.transport.products import full_float32


class _Reader:
    """Reads the parameters of a section and holds them until another section is asked for."""

    def __init__(self, parent: Network) -> None:
        self._parent, self._section, self._state = parent, "", State()

    def __call__(self, section: str) -> State:
        if section != self._section:
            self._section, self._state = "", State()  # let go first: two blocks are not in memory at once
            self._section, self._state = section, self._parent.parameters(section)
        return self._state


class Team:
    """Parents over one calibration set.

    Args:
        parents: the networks, prepared as the configurations need them.
        anchor: index of the anchor.
        data: the calibration set; None where nothing is run.
        survey: what is known of whole networks.
        progress: wraps the sections of each walk.

    Attributes:
        kind: what the parents' outputs mean.
        known: how much each parent knows of each tag, [parents, tags]; None where nobody asked, or they give no tags.
        apart: whether the parents know other classes.
    """

    def __init__(
        self, parents: Sequence[Network], anchor: int, data: CalibrationSet | None, survey: Survey, progress: Progress
    ) -> None:
        self.parents, self.anchor, self.survey, self.progress = parents, anchor, survey, progress
        self.bindings = [parent.binding for parent in parents]
        self.binding = self.bindings[anchor]
        self.kind = kind_of(parents[anchor].module)
        self.known: Tensor | None = None
        self.apart = False
        self._data = data
        self.readers = [_Reader(parent) for parent in parents]
        # a calibration set of which this rank has no batch is empty, and still one
        self.flows = (
            [] if data is None else [Flow(parent, data, f"parent {index}") for index, parent in enumerate(parents)]
        )

    @property
    def data(self) -> CalibrationSet:
        """The calibration set."""
        assert self._data is not None  # the plan says whether anything is run
        return self._data

    def head(self, samples: int) -> "Team":
        """The same parents over the first samples."""
        found = Team(self.parents, self.anchor, self.data.head(samples), self.survey, self.progress)
        found.known, found.apart = self.known, self.apart
        return found

    def tag_weights(self, weights: Sequence[float]) -> list[Tensor] | None:
        """The parents' weights for each tag, [tags] each: a tag is mostly of those that know it. None without tags."""
        if self.known is None:
            return None
        own = torch.tensor(weights, dtype=torch.float64)[:, None]
        found = own * self.known
        return list(
            torch.where(found.sum(0) > 0, found, own.expand_as(found)) / torch.where(found.sum(0) > 0, found.sum(0), 1)
        )

    def states(self, section: str) -> list[State]:
        """The parameters that a section uses, of every parent."""
        return [read(section) for read in self.readers]

    def own(self, section: str, state: State) -> State:
        """Of the parameters that a section uses, those that belong to it."""
        return {name: tensor for name, tensor in state.items() if self.binding.owners[name] == section}

    def observe(self, wanted: Wanted, states: Sequence[State], *, others: bool) -> Statistics:
        """Takes the batches through a section; where nothing is asked of the others, the anchor goes alone."""
        states = [parent.beneath(wanted.section) | state for parent, state in zip(self.parents, states, strict=True)]
        if others:
            return observe(self.flows, self.anchor, states, self.data, wanted)
        return observe([self.flows[self.anchor]], 0, [states[self.anchor]], self.data, wanted)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Where networks are run: without gradients and dropout, products in full float32."""
        modules = [one.module for parent in self.parents for one in (parent, parent.original)]
        with torch.no_grad(), full_float32(), eval_mode(*modules):
            yield


def look(team: Team, keys: Sequence[Key], magnitudes: Sequence[str], tokens: str, together: Mapping[str, str]) -> None:
    """Walks through the parents alone; the survey learns the moments of `keys`, magnitudes of the anchor's axes, and
    the products of the joins `together`: see Plan."""
    wanted = [
        Wanted(
            name,
            tuple(key for key in keys if section_of(key[0]) == name),
            tuple(axis for axis in magnitudes if section_of(axis) == name),
            together=tuple(axis for axis in together if section_of(axis) == name),
            tokens=tokens,
        )
        for name in team.binding.sections
    ]
    last = max((at for at, one in enumerate(wanted) if one.keys or one.magnitudes or one.together), default=-1)
    with team.at_work():
        for one in team.progress(wanted[: last + 1], "look"):
            # No name for what is found: the next section's is not in memory beside it.
            team.survey.add(team.observe(one, team.states(one.section), others=bool(keys or together)), together)


class Sweep:
    """The walk that fuses, under one configuration.

    Args:
        team: the parents.
        plan: of the configuration.
        config: what is asked for.
        weights: one number a parent.
        goal: what the fused network looks like: the anchor, or one whose parameters are still to come.
        sink: takes the fused parameters.
        maps: where maps are kept.
        trial: see `Refit`.

    Attributes:
        aligned: the parents, with the maps found so far.
    """

    def __init__(
        self,
        team: Team,
        plan: Plan,
        config: FuseConfig,
        weights: Sequence[float],
        goal: Network,
        sink: Sink,
        maps: Kept,
        *,
        trial: bool = False,
    ) -> None:
        self.team, self.plan, self.config, self.weights, self.sink = team, plan, config, weights, sink
        self.goal, self._label = goal, "try" if trial else "fuse"
        anchor = team.parents[team.anchor]
        idle = [parent.idle if config.strategy == "transport" else frozenset() for parent in team.parents]
        self.aligners = {
            index: Aligner(
                binding,
                goal.binding,
                config.align,
                plan.problems,
                maps,
                index,
                anchor.device,
                weights[index],
                idle[index],
            )
            for index, binding in enumerate(team.bindings)
            if index != team.anchor or config.strategy == "joint"
        }
        self.aligned = [
            AlignedParent(
                parent,
                self.aligners[index].alignment if index in self.aligners else None,
                weights[index],
                idle[index],
            )
            for index, parent in enumerate(team.parents)
        ]
        self._magnitudes = dict(team.survey.magnitudes)
        self._wanted = [self._wanted_in(section) for section in plan.sections]
        self._others = any(one.keys or one.targets for one in self._wanted)
        self._fused = Network(
            goal.module, goal.binding, "the fused model", read=sink.read, device=anchor.device, float32=True
        )
        self._refit = None
        if plan.fits:
            flow, tags = Flow(self._fused, team.data, "fused"), team.tag_weights(weights)
            self._refit = Refit(flow, self.aligned, team.data, apart=team.apart, tags=tags, trial=trial)

    @property
    def fused(self) -> Flow:
        """The hidden states of a fused network that is fitted; behind the walk they stand before the tail."""
        assert self._refit is not None
        return self._refit.flow

    def run(self) -> None:
        """Walks from the stem to the tail."""
        last = max((at for at, one in enumerate(self._wanted) if one.keys or one.magnitudes or one.targets), default=-1)
        fitted = max((at for at, one in enumerate(self.plan.sections) if one.stages), default=-1)
        with self.team.at_work():
            self._join_streams()
            self._solve(self.plan.whole, self._nothing())
            for at, section in enumerate(self.team.progress(self.plan.sections, self._label)):
                states = self.team.states(section.name)
                found = self._nothing()
                if at <= last:
                    found = self.team.observe(self._wanted[at], states, others=self._others)
                self._magnitudes |= found.magnitudes
                self._choose(section.problems, states)
                self._solve(section.problems, found)
                del found  # a fit needs the memory
                fused = self._averaged(section.name, states)
                if at <= fitted:
                    fused = self._fitted(section, fused, states, onward=at < fitted)
                    self._forget(self._wanted[at])
                self.sink.write(fused)
                del states, fused  # before the next section is read

    def _join_streams(self) -> None:
        """Finds the parents' maps into the one stream that holds them all, where that is asked for."""
        centred = self.team.binding.family.norm != "rms"
        for axis in dict.fromkeys(self.plan.together.values()):
            widths = [binding.axes[axis].size for binding in self.team.bindings]
            width = self.goal.binding.axes[axis].size
            found = joint_stream(
                self.team.survey.streams[axis], widths, self.weights, width, centred=centred, anchor=self.team.anchor
            )
            for index, aligner in self.aligners.items():
                aligner.streams = {**aligner.streams, axis: found[index]}

    def _choose(self, problems: Sequence[Problem], states: Sequence[State]) -> None:
        """Chooses among the units of all parents, where that is asked for."""
        for problem in problems:
            if isinstance(problem, ChosenUnits):
                there = [problem.section not in parent.idle for parent in self.team.parents]
                chosen = choose(problem, self.team.bindings, states, self.team.anchor, self.goal.binding, there)
                for index, aligner in self.aligners.items():
                    aligner.chosen[problem.axes[0]] = chosen[index]

    def _forget(self, wanted: Wanted) -> None:
        for index, _ in enumerate(self.team.parents):
            for target in wanted.targets:
                for batch in self.team.data:
                    del self.team.data.kept[target.key(wanted.section, index, batch)]

    def _nothing(self) -> Statistics:
        return Statistics([{} for _ in self.team.parents])

    def _wanted_in(self, section: SectionPlan) -> Wanted:
        known = self.team.survey
        targets = [target for stage in section.stages for target in stage.targets]
        return Wanted(
            section.name,
            tuple(key for key in section.keys if not known.has(key)),
            tuple(axis for axis in section.magnitudes if axis not in known.magnitudes),
            targets,
            tokens=self.config.calibration.tokens,
        )

    def _solve(self, problems: Sequence[Problem], found: Statistics) -> None:
        for index, aligner in self.aligners.items():
            aligner.magnitudes = self._magnitudes
            aligner.evidence = self._evidence(index, found)
            for problem in problems:
                if problem.whole or problem.section not in self.aligned[index].idle:
                    aligner.solve(problem)
                else:
                    aligner.pass_on(problem)
            del aligner.evidence  # it holds the section's moments and parameters

    def _evidence(self, index: int, found: Statistics) -> Evidence:
        scale, centred = self.config.calibration.scale, self.config.align.metric == "correlation"
        team = self.team
        if self.config.align.evidence == "weights":
            readers = team.readers[index], team.readers[team.anchor]
            return WeightEvidence(
                readers[0], team.bindings[index], readers[1], team.binding, scale, centred=centred
            )  # fmt: skip
        moments = ChainMap(found.moments[index], team.survey.of(index))  # type: ignore[arg-type]  # reads only
        return ActivationEvidence(moments, team.binding, scale, centred=centred)

    def _averaged(self, section: str, states: Sequence[State]) -> State:
        own, anchor = [in_float32(self.team.own(section, state)) for state in states], self.team.anchor
        blank = self.goal is not self.team.parents[anchor]
        target = self.team.own(section, self.goal.parameters(section)) if blank else own[anchor]
        return averaged(self.aligned, anchor, own, self.plan.keep, target, self.goal.binding)

    def _fitted(self, section: SectionPlan, own: State, states: Sequence[State], *, onward: bool) -> State:
        """Fits the stages of a section, and takes the fused network's batches through it if there is more to fit."""
        assert self._refit is not None
        others = [name for name in self.team.binding.uses[section.name] if name not in own]
        state = own | in_float32({name: self.sink.read(name).to(self._fused.device) for name in others})
        state = self._fused.beneath(section.name) | state
        for stage in section.stages:
            self._refit.fit(section.name, stage, state, states)
        if onward:
            self._refit.onward(section.name, state)
        fitted = {name: state[name] for name in own}
        for parent in self.team.parents:
            if parent.absent is not None:
                copy_rows(fitted, own, self.team.binding, VOCABULARY, parent.absent)
        return fitted
