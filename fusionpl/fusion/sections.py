"""What is done in one section: what is asked of the parents, what describes their units, their average, its refit."""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fusionpl.alignment.evidence import ActivationEvidence, Evidence, WeightEvidence
from fusionpl.alignment.maps import Maps
from fusionpl.alignment.problem import Observed
from fusionpl.calibration.observe import Statistics, Wanted
from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.families.apply import State, copy_rows, in_float32
from fusionpl.families.family import VOCABULARY
from fusionpl.fusion.average import averaged
from fusionpl.fusion.parents import AlignedParent
from fusionpl.fusion.plan import Plan, SectionPlan, observed_of
from fusionpl.fusion.result import Writer
from fusionpl.fusion.survey import Survey
from fusionpl.fusion.walk import Walk


def wanted_in(section: SectionPlan, plan: Plan) -> Wanted:
    """What the parents are asked for in a section."""
    return Wanted(
        section.name,
        section.keys,
        section.magnitudes,
        [target for group in section.groups for target in group.targets],
        tokens=plan.config.calibration.tokens,
    )


def observed(
    walk: Walk,
    plan: Plan,
    survey: Survey,
    states: Sequence[State] = (),
    shown: Statistics | None = None,
    magnitudes: Mapping[str, Tensor] | None = None,
) -> Observed:
    """What the problems of a section are solved from.

    Args:
        walk, plan, survey: of the fusion.
        states: the parents' parameters of the section; none for problems that look at whole networks.
        shown: what the parents showed there.
        magnitudes: of this and of earlier sections.
    """
    config, team = plan.config, walk.team
    scale, centred = config.calibration.scale, config.align.metric == "correlation"
    evidence: list[Evidence] = []
    for index, binding in enumerate(team.bindings if config.strategy == "transport" else ()):
        if config.align.evidence == "weights":
            readers = walk.readers[index], walk.readers[team.anchor]
            evidence.append(
                WeightEvidence(readers[0], binding, readers[1], team.binding, scale, centred=centred)
            )  # fmt: skip
        else:
            here = shown.moments[index] if shown is not None and shown.moments else {}
            moments = ChainMap(here, survey.moments[index])  # type: ignore[arg-type]  # reads only
            evidence.append(ActivationEvidence(moments, team.binding, scale, centred=centred))
    return replace(
        observed_of(team, plan), states=states, evidence=evidence, magnitudes=magnitudes or {}, streams=survey.streams
    )


def aligned_parents(walk: Walk, plan: Plan, maps: Sequence[Maps]) -> list[AlignedParent]:
    """The parents with their maps so far."""
    team, transports = walk.team, plan.config.strategy == "transport"
    return [
        AlignedParent(
            network,
            None if transports and index == team.anchor else own,
            weight,
            team.missing[index] if transports else frozenset(),
        )
        for index, (network, own, weight) in enumerate(zip(team.networks, maps, plan.weights, strict=True))
    ]


def average_section(
    section: str, walk: Walk, plan: Plan, parents: Sequence[AlignedParent], states: Sequence[State]
) -> State:
    """The mean of the aligned parents' parameters that belong to a section, in float32."""
    own, team = [in_float32(walk.own(section, state)) for state in states], walk.team
    blank = plan.target is not team.reference
    target = walk.own(section, plan.target.parameters(section)) if blank else own[team.anchor]
    return averaged(parents, team.anchor, own, plan.keep, target, plan.target.binding)


def completed(section: str, own: State, fused: SectionedModel, writer: Writer) -> State:
    """The fused network's parameters that it takes to run a section: its own, and those of earlier sections."""
    others = [name for name in fused.binding.uses[section] if name not in own]
    written = {name: writer.read(name).to(fused.device) for name in others}
    return fused.states(section, own | in_float32(written))


def anchored(fitted: State, average: State, walk: Walk) -> State:
    """The parameters that belong to a section; tokens that parents lack have the rows of the average."""
    state = {name: fitted[name] for name in average}
    for network in walk.team.networks:
        if network.missing_tokens is not None:
            copy_rows(state, average, walk.team.binding, VOCABULARY, network.missing_tokens)
    return state
