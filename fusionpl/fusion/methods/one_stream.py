"""One stream for all parents: it holds as much of their streams, side by side, as fits into its width.

With the parents' streams A_p [rows, n_p] in canonical form, and their weights w_p, C is the mean over all joins of the
products of [w_1^1/2 A_1, w_2^1/2 A_2, ...] with itself. V, the eigenvectors of C with the largest eigenvalues, is cut
into one part V_p [n_p, n] a parent. The one stream is T = sum over p of w_p^1/2 A_p V_p, and parent p's own is read
from it as w_p^-1/2 T V_p^T. Heads and hidden units stay whole: they are chosen among those of all parents. What writes
the stream, and what reads it, is then refitted.

Relatives: the rotation and deletion of Ashkboos et al., "SliceGPT", ICLR 2024 (arXiv 2401.15024), of one network;
Stoica et al., "ZipIt!", ICLR 2024.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionpl.alignment.maps import Found, Maps
from fusionpl.alignment.problem import Observed, Problem, seen_at, sizes_in
from fusionpl.errors import FusionError
from fusionpl.families import canonical
from fusionpl.families.apply import State
from fusionpl.families.axes import Axis, Binding
from fusionpl.families.canonical import inseparable
from fusionpl.families.family import TAIL
from fusionpl.fusion.config import FuseConfig
from fusionpl.fusion.methods.method import Method
from fusionpl.transport.maps import TransportMap


@dataclass(frozen=True)
class JointStream(Problem):
    """The maps of all parents' streams into one that holds them side by side.

    Attributes:
        joins: where the streams are seen.
    """

    joins: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """The stream goes through all sections."""
        return True

    @property
    def together(self) -> tuple[str, ...]:
        """Where it is seen."""
        return self.joins

    def check(self, observed: Observed) -> None:
        """Nothing: widths may differ."""

    def solve(self, observed: Observed, maps: Sequence[Maps]) -> list[Found]:
        """One basis for all: see `joint_stream`."""
        first = self.axes[0]
        streams = joint_stream(
            observed.streams[first],
            [binding.axes[first].size for binding in observed.parents],
            observed.weights,
            observed.target.axes[first].size,
            centred=observed.target.family.norm != "rms",
            anchor=observed.anchor,
        )
        return [dict.fromkeys(self.axes, own) for own in streams]

    def summary(self, axis: str, binding: Binding) -> str:
        """One basis for all."""
        return "one stream for all parents"


@dataclass(frozen=True)
class ChosenUnits(Problem):
    """Units outside the stream, which stay whole: a mixture of two that match badly computes neither.

    All of the anchor's, then those of the others that write most into the stream; where the fused network has fewer
    than the anchor, those of the anchor's that do. Such rankings are known from pruning, e.g. Li et al., "Pruning
    Filters for Efficient ConvNets", ICLR 2017.

    Attributes:
        heads: whether they are chosen a group of heads at a time.
        even: an equal share of each parent's, in place of all of the anchor's.
    """

    heads: bool = False
    even: bool = False

    def count(self, binding: Binding) -> int:
        """The number of what is chosen from."""
        axis = binding.axes[self.axes[0]]
        return axis.groups if self.heads else axis.size

    def gives(self, parent: Binding, target: Binding) -> int:
        """How much of a parent may be chosen: nothing where its heads are built otherwise."""
        ours, theirs = ([_built(one.axes[axis], self.count(one)) for axis in self.axes] for one in (parent, target))
        return self.count(parent) if ours == theirs else 0

    def check(self, observed: Observed) -> None:
        """The parents together must have as many units as the fused network wants, and the anchor's must be built as
        the fused network's are."""
        there = [self.section not in missing for missing in observed.missing]
        given = [self.gives(parent, observed.target) for parent in observed.parents]
        wanted, what = self.count(observed.target), "heads" if self.heads else "units"
        if not all(there):
            return  # places that nobody fills stay empty
        if not given[observed.anchor]:
            raise FusionError(f"'{self.axes[0]}' of the fused network has other heads than the anchor; leave width out")
        if sum(given) < wanted:
            raise FusionError(
                f"'{self.axes[0]}' would have {wanted} {what} and the parents have {sum(given)} of that kind together; "
                f"choose a width of at most {sum(given) / given[observed.anchor]:g} times the anchor's"
            )

    def solve(self, observed: Observed, maps: Sequence[Maps]) -> list[Found]:
        """Chooses among the units of all parents: see `choose`."""
        there = [self.section not in missing for missing in observed.missing]
        chosen = choose(self, observed.parents, observed.states, observed.anchor, observed.target, there)
        return [
            {axis: self._map(axis, observed, index, *places) for axis in self.axes}
            for index, places in enumerate(chosen)
        ]

    def _map(self, axis: str, observed: Observed, index: int, units: Tensor, places: Tensor) -> TransportMap:
        """A parent's units at the places that they are given."""
        weight = observed.weights[index]
        n, m = sizes_in([axis], observed.parents[index], observed.target)
        width = m // self.count(observed.target)
        rows, columns = ((at[:, None] * width + torch.arange(width)).to(observed.device) for at in (units, places))
        plan = torch.zeros(n, m, dtype=torch.float64, device=observed.device)
        plan[rows.flatten(), columns.flatten()] = 1
        # A mean over the parents must leave a unit as it is. In the tail, where nothing refits a decoder, what it
        # reads stands for as many units as its parent has.
        read_gain = n / m / weight if self.section == TAIL else 1.0
        return TransportMap(plan, "chosen", "orthogonal", gain=1 / weight, read_gain=read_gain)

    def summary(self, axis: str, binding: Binding) -> str:
        """Where the units are seen."""
        repeats = binding.axes[axis].repeats
        which = "units of all parents alike" if self.even else "units of the parents, the anchor's first"
        return f"{which}, {seen_at(repeats or axis, binding, ((axis,),))}"


def _built(axis: Axis, count: int) -> tuple[int, int, int]:
    return axis.size // count, axis.members, axis.pairs


def joint_problems(target: Binding, config: FuseConfig) -> list[Problem]:
    """All problems of a fusion into one stream; each free axis is in one of them.

    Args:
        target: the fused network's binding.
        config: its `units` says which are chosen.
    """
    even = config.units == "even"
    problems: list[Problem] = []
    for members in target.streams():
        seen = (axis for axis in members if target.on_boundary(axis) or axis in target.taps)
        problems.append(JointStream(tuple(members), joins=tuple(axis for axis in seen if axis in target.joins)))
    problems += [ChosenUnits(group, heads=True, even=even) for group in target.attention]
    held = {axis for problem in problems for axis in problem.axes}
    tied: dict[str, list[str]] = {}
    for axis, root in target.tied().items():
        if axis not in held:
            tied.setdefault(root, []).append(axis)
    return [*problems, *(ChosenUnits(tuple(axes), even=even) for axes in tied.values())]


def choose(
    problem: ChosenUnits,
    parents: Sequence[Binding],
    states: Sequence[State],
    anchor: int,
    target: Binding,
    there: Sequence[bool],
) -> list[tuple[Tensor, Tensor]]:
    """Chooses units of the parents.

    Args:
        problem: which.
        parents: their bindings.
        states: their parameters of the section, in canonical form.
        anchor: index of the anchor.
        target: the fused network's binding.
        there: whether each parent has the block at all.

    Returns:
        For each parent the numbers of its units (or groups of heads) that are taken, and their places, both int64 [n].
    """
    wanted = problem.count(target)
    use = [
        _use(problem, parent, state) if has and problem.gives(parent, target) else torch.empty(0, dtype=torch.float64)
        for parent, state, has in zip(parents, states, there, strict=True)
    ]
    order = [each.sort(descending=True, stable=True).indices.tolist() for each in use]
    giving = sorted((index for index, each in enumerate(use) if len(each)), key=lambda index: index != anchor)
    share, more = divmod(wanted, len(giving) if problem.even else 1)
    places: list[tuple[int, int]] = []
    for rank, index in enumerate(giving if problem.even else giving[:1]):
        places += [(index, unit) for unit in sorted(order[index][: share + (rank < more)])]
    taken = set(places)
    rest = [(index, unit) for index in giving for unit in range(len(use[index])) if (index, unit) not in taken]
    rest.sort(key=lambda place: -float(use[place[0]][place[1]]))
    places += rest[: wanted - len(places)]
    chosen = []
    for index in range(len(parents)):
        mine = [(unit, place) for place, (owner, unit) in enumerate(places) if owner == index]
        both = torch.tensor(mine, dtype=torch.int64).reshape(-1, 2)
        chosen.append((both[:, 0], both[:, 1]))
    return chosen


def _use(problem: ChosenUnits, binding: Binding, state: State) -> Tensor:
    """About how much each unit, or group of heads, writes: the energy of its incoming weights times that of its
    outgoing ones, which is right for inputs that are white, as those behind a norm nearly are; float64."""
    count = problem.count(binding)
    total = torch.zeros(count, dtype=torch.float64)
    for axis in problem.axes:
        out, into = (
            _energy(binding, state, name, count, reads=reads)
            for name, reads in ((axis, True), (binding.axes[axis].repeats or axis, False))
        )
        total += out * into
    return total


def _energy(binding: Binding, state: State, axis: str, count: int, *, reads: bool) -> Tensor:
    total = torch.zeros(count, dtype=torch.float64)
    for slot in binding.slots:
        for dim, place in enumerate(zip(slot.axes, slot.reads, strict=True)):
            if place == (axis, reads) and slot.parameter in state and not slot.gain:
                rows = slot.of(state[slot.parameter]).movedim(dim, 0).reshape(count, -1)
                total += rows.double().square().sum(1).cpu()
    return total


def joint_stream(
    products: Tensor, widths: Sequence[int], weights: Sequence[float], width: int, *, centred: bool, anchor: int = 0
) -> list[TransportMap]:
    """The maps of streams into one: the directions in which they, side by side, have most energy.

    The basis is turned as near as it comes to the anchor's units, followed by those of the others: what a norm inside a
    post-LN stream does unit by unit then stays as near to what it does in the parents.

    Args:
        products: of the streams' units side by side, [sum of widths, sum of widths].
        widths: of the streams.
        weights: one number above 0 a parent, summing to 1: the share of its stream's energy.
        width: of the one stream.
        centred: a norm takes away the means over the units.
        anchor: index of the anchor.

    Returns:
        A map [width of the parent, width] for each parent. With their weights they add up to a stream T = sum of
        w^1/2 A V, whose energy is the parents' mean where V, the rows of an orthonormal basis, holds all of it; and
        each parent's stream is read from it as w^-1/2 T V^T.

    Raises:
        FusionError: the products are not finite.
    """
    if not bool(products.isfinite().all()):
        raise FusionError("the parents' streams hold NaN or infinite values; check calibration data and parents")
    parts = list(zip(widths, weights, strict=True))
    scale = torch.cat([products.new_full((n,), w**0.5) for n, w in parts])
    energies, shared = products * torch.outer(scale, scale), sum(widths)
    inside = torch.eye(width, dtype=products.dtype, device=products.device)
    if centred:  # each stream's mean comes last, and is no direction
        means = torch.block_diag(*(products.new_full((n, n), 1 / n) for n in widths))
        energies = energies - means @ energies - energies @ means + means @ energies @ means
        energies, shared = energies - energies.trace() * means, shared - len(widths)
        inside[:, 0] = 1
        inside = torch.linalg.qr(inside).Q[:, 1:]
    vectors = torch.linalg.eigh(energies).eigenvectors.flip(1)[:, : min(inside.shape[1], shared)]
    places = products.new_zeros(len(products), width)
    order = sorted(range(len(widths)), key=lambda index: index != anchor)
    rows = torch.arange(len(products), device=products.device).split(list(widths))
    first = torch.cat([rows[index] for index in order])[:width]
    places[first, torch.arange(len(first), device=products.device)] = 1
    left, _, right = torch.linalg.svd(vectors.T @ places @ inside, full_matrices=False)
    basis = vectors @ left @ right @ inside.T
    if centred:
        # No stream of a pre-LN network has a mean over the units, but the shift of a norm that no bias takes may.
        mean = torch.cat([products.new_full((n,), (w / n) ** 0.5) for n, w in parts])
        basis += torch.outer(mean, torch.full_like(basis[0], width**-0.5))
    ratio = (sum(n * w for n, w in parts) / width) ** 0.5
    return [
        TransportMap(part, "joint", "orthogonal", gain=w**-0.5, read_gain=w**-0.5, norm_gain=ratio)
        for part, w in zip(basis.split(list(widths)), weights, strict=True)
    ]


def heads_left_out(problems: Sequence[Problem], parents: Mapping[str, Binding], observed: Observed) -> list[str]:
    """A line for each parent none of whose heads can be taken: they are taken as they are.

    Args:
        problems: of the fusion.
        parents: name -> binding.
        observed: the same parents beside the fused network.
    """
    choices = [problem for problem in problems if isinstance(problem, ChosenUnits) and problem.heads]
    lines = []
    for (name, binding), missing in zip(parents.items(), observed.missing, strict=True):
        here = [problem for problem in choices if problem.section not in missing]
        out = [problem for problem in here if not problem.gives(binding, observed.target)]
        if out:
            theirs, ours = (_heads_of(each.axes[out[0].axes[0]]) for each in (binding, observed.target))
            where = "" if len(out) == len(here) else f" in {len(out)} of {len(here)} blocks"
            lines.append(
                f"{name} has heads of {theirs}, the fused model of {ours}: its stream and its other units are taken, "
                f"and none of its heads{where}"
            )
    return lines


def _heads_of(axis: Axis) -> str:
    rotated = f", {2 * axis.pairs} of them rotated" if axis.pairs else ""
    return f"{axis.width} units{rotated}" + (f", {axis.members} to a key-value head" if axis.members > 1 else "")


ONE_STREAM = Method(
    problems=joint_problems,
    form=lambda config: canonical,
    hindrance=lambda binding, config: inseparable(binding),
    instead="strategy transport",
    remarks=heads_left_out,
)
