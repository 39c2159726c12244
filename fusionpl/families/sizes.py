"""The sizes of axes, from the shapes of all parameters together."""

import math
from collections.abc import Mapping, Sequence

from fusionpl.errors import FusionError

Layout = tuple[
    tuple[tuple[str, ...], bool], ...
]  # for each dimension its axes, and whether they are repeated to fill it


def sizes_of(
    shapes: Mapping[str, Sequence[int]],
    layouts: Mapping[str, Layout],
    ranks: Mapping[str, int],
    heads: Mapping[str, int],
) -> dict[str, int]:
    """The size of every axis.

    Args:
        shapes: parameter -> its shape.
        layouts: parameter -> the axes of its dimensions.
        ranks: section -> its place in forward order.
        heads: axis -> the number of its heads, of those that have any: in one map they are of one width.

    Returns:
        Axis -> size, section by section, and as the parameters name them inside a section; fixed axes first.

    Raises:
        FusionError: sizes that disagree; names the tensor.
    """
    sizes: dict[str, int] = {}
    source: dict[str, str] = {}
    pending = [
        (name, position, axes, repeated, shapes[name][position])
        for name, layout in layouts.items()
        for position, (axes, repeated) in enumerate(layout)
    ]

    def settle(axis: str, size: int, name: str) -> None:
        sizes[axis], source[axis] = size, name

    while pending:
        left = []
        for name, position, axes, repeated, size in pending:
            unknown = [axis for axis in axes if axis not in sizes]
            known = sum(sizes[axis] for axis in axes if axis in sizes)
            if len(unknown) == 1 and not repeated:
                settle(unknown[0], size - known, name)
            elif unknown:
                left.append((name, position, axes, repeated, size))
            elif axes and (size % known if repeated else known != size):
                raise FusionError(
                    f"'{name}': dimension {position} has {size} units, but "
                    + " + ".join(f"{axis} ({sizes[axis]}, from '{source[axis]}')" for axis in axes)
                    + f" make {known}" + (" or a multiple of it" if repeated else "")
                )  # fmt: skip
            elif not axes and size != 1:
                raise FusionError(f"'{name}': dimension {position} has {size} units, the family says 1")
        if len(left) == len(pending):
            name, position, axes, _, size = left[0]
            unknown = [axis for axis in axes if axis not in sizes]
            counts = [heads.get(axis, 1) for axis in unknown]
            shares = [count // math.gcd(*counts) for count in counts]
            share, rest = divmod(size - sum(sizes.get(axis, 0) for axis in axes), sum(shares))
            if rest:
                raise FusionError(f"'{name}': {size} units do not divide among {', '.join(axes)}")
            for axis, times in zip(unknown, shares, strict=True):
                settle(axis, share * times, name)
        pending = left
    appearance = dict.fromkeys(axis for layout in layouts.values() for axes, _ in layout for axis in axes)
    return {axis: sizes[axis] for axis in sorted(appearance, key=lambda name: ranks.get(name.rpartition(".")[0], -1))}
