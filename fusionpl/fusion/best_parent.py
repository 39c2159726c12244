"""`strategy head`: one parent as it is, with its head alone fitted."""

import sys

from fusionpl.calibration.kept import Kept
from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.families.apply import own_state
from fusionpl.families.binding import bind
from fusionpl.fusion.heads import best_head
from fusionpl.fusion.parents import AlignedParent
from fusionpl.fusion.plan import Plan
from fusionpl.fusion.result import FusionResult, InMemory
from fusionpl.fusion.survey import Survey
from fusionpl.fusion.walk import Walk


def keep_best_parent(walk: Walk, plan: Plan, survey: Survey) -> FusionResult:
    """One parent, and its head fitted to what all predict: `strategy head`.

    Raises:
        FusionError: see `best_head`.
    """
    team = walk.team
    index, model, fit = best_head(
        [network.whole() for network in team.networks], survey.votings(plan.weights), walk.data,
        family=team.binding.family,
    )  # fmt: skip
    binding, device = bind(model, team.binding.family), team.networks[index].device
    target = SectionedModel(model, binding, "the fused model", device=device)
    writer = InMemory(target, Kept(sys.maxsize))
    writer.write(own_state(model))
    parents = [
        AlignedParent(network, None, weight) for network, weight in zip(team.networks, plan.weights, strict=True)
    ]
    note = (
        f"head: {team.names[index]} is nearest to the mean of all with its head fitted ({fit.after:.4f} nats away on "
        f"samples that were left out, {fit.before:.4f} before)"
    )
    return FusionResult(writer, parents, index, target, plan.config, notes=[note])
