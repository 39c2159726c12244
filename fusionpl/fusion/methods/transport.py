"""The paper's fusion: units are matched by optimal transport, and what they are matched to is averaged.

For each axis of a parent (the units of one layer) the cost D [n_parent, n_anchor] between its units and the anchor's,
by their activations over the calibration set or by their incoming weights, gives a transport plan P: the minimum of
<P, D>, for Sinkhorn minus reg times the entropy of P, over plans with uniform marginals. With T_out = P, its columns
scaled to sum to 1, and T_in = P, its rows scaled so, a weight W [in, out] becomes T_in_of_inputs^T W T_out_of_outputs:

    W' = T_in^T W T_out,        fused W = sum over parents p of w_p W'_p.

The residual stream gets its map from what is added to it (`align.residual`), or one map for all of it (`tie`).
With `align.stream rotation` the map of the stream is the rotation that brings the parents' streams nearest to each
other, and so is that of each pair of heads; units of MLPs are transported.

Sources: Imfeld et al., "Transformer Fusion with Optimal Transport", ICLR 2024 (arXiv 2310.05719); Singh and Jaggi,
"Model Fusion via Optimal Transport", NeurIPS 2020; for rotations Theus et al., NeurIPS 2025 (arXiv 2506.22712).
"""

from fusionpl.alignment.config import residual_of
from fusionpl.alignment.grouped import grouped_heads, needs_groups
from fusionpl.alignment.problem import Problem
from fusionpl.alignment.problems import Gated, Heads, Joined, Joint, Order, Stream, Units
from fusionpl.calibration.moments import Key
from fusionpl.families import canonical
from fusionpl.families.axes import Binding
from fusionpl.families.canonical import unrotatable, without_scales
from fusionpl.fusion.config import FuseConfig
from fusionpl.fusion.methods.method import Method, Prepare


def transport_problems(target: Binding, options: FuseConfig) -> list[Problem]:
    """All problems of an alignment, in the order of the axes; each free axis is in one of them.

    This is where what a family allows meets what the configuration asks for.

    Args:
        target: the fused network's binding; parents of one family and depth have the same problems.
        options: whose `align` has solver, metric and policies.
    """
    binding, config = target, options.align
    seen = config.evidence == "activations"
    residual = residual_of(config, binding)

    def alone(*axes: str) -> tuple[Key, ...]:
        return tuple((axis,) for axis in axes) if seen else ()

    problems: dict[str, Problem] = {}
    if residual == "tie":  # a rotation of the stream is tied too
        for members in binding.streams():
            seen_at = [axis for axis in members if binding.on_boundary(axis) or axis in binding.taps]
            joins = tuple(axis for axis in seen_at if axis in binding.joins)
            stream = Stream(tuple(members), alone(*joins), joins=joins, rotation=config.stream == "rotation")
            problems |= dict.fromkeys(members, stream)
    circuit_of = {axis: circuit for circuit in binding.circuits for axis in circuit}
    group_of = {axis: group for group in binding.attention for axis in group}
    gated = {axis: (gate, partner) for partner, gate in binding.gates.items() for axis in (gate, partner)}
    ordered: dict[str, list[tuple[str, ...]]] = {}
    for group in binding.attention:
        ordered.setdefault(binding.axes[group[0]].order or "", []).append(group)

    def matched(group: tuple[str, ...]) -> Heads:
        circuits = tuple(dict.fromkeys(circuit_of.get(one, (one,)) for one in group))
        rotation, order = config.stream == "rotation", binding.axes[group[0]].order
        return Heads(group, alone(*group), circuits=circuits, rotation=rotation, order=order)

    for axis in binding.free:
        if axis in problems:
            continue
        problem: Problem
        circuit = circuit_of.get(axis, (axis,))
        if axis in binding.joins:
            join = binding.joins[axis]
            weighted = residual in ("weighted_scalar", "weighted_matrix")
            magnitudes = (join.skip, join.branch) if weighted else ()
            problem = Joined(axes=(axis,), magnitudes=magnitudes, join=join, policy=residual)
        elif axis in gated:
            problem = Gated(gated[axis], alone(*gated[axis]))
        elif axis in group_of and needs_groups(binding, group_of[axis]):
            problem = grouped_heads(binding, group_of[axis], config)
        elif axis in group_of and (config.heads == "matched" or binding.axes[axis].order):
            problem = matched(group_of[axis])
        elif axis in ordered:
            attentions = tuple(matched(group) for group in ordered[axis])
            keys = tuple(key for one in attentions for key in one.keys)
            problem = Order((axis,), (*alone(axis), *keys), attentions=attentions)
        elif config.qk == "joint" and len(circuit) > 1 and len({binding.runs_over[one] for one in circuit}) == 1:
            problem = Joint(circuit, (circuit,) if seen else ())
        elif config.qk != "separate":  # queries and keys of different tokens can't be one set
            problem = Units(circuit, alone(*circuit))
        else:
            problem = Units((axis,), alone(axis))
        problems |= dict.fromkeys(problem.axes, problem)
    return list({id(problem): problem for problem in problems.values()}.values())


def _form(config: FuseConfig) -> Prepare | None:
    if config.align.stream == "rotation":
        return canonical
    return without_scales if config.refit.method != "none" else None


TRANSPORT = Method(
    problems=transport_problems,
    form=_form,
    hindrance=lambda binding, config: unrotatable(binding) if config.align.stream == "rotation" else None,
    instead="align.stream transport with align.residual tie and align.solver assignment",
)
