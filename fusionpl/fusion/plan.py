"""What a fusion would do, as text: `fuse.py --dry-run`."""

from collections.abc import Sequence

from fusionpl.alignment import AlignConfig
from fusionpl.families import Binding
from fusionpl.fusion.config import FuseConfig


def plan(bindings: Sequence[Binding], anchor: int, config: FuseConfig, names: Sequence[str]) -> str:
    """A table of axes with their sizes (parents in order), and how each gets its map."""
    reference = bindings[anchor]
    align = config.align
    header = (
        f"{reference.family.name}, {reference.depth} blocks, {len(reference.slots)} parameter slots on "
        f"{len(reference.free)} free axes; anchor: {names[anchor]}; {_solver(align)}, {align.metric} cost / "
        f"{align.normalize}" + (f"; refit: {config.refit.method}" if config.refit.method != "none" else "")
    )
    rows = [("axis", "units", "heads", "map")]
    for name in reference.free:
        axes = [binding.axes[name] for binding in bindings]
        sizes = dict.fromkeys(str(axis.size) for axis in axes)
        heads = dict.fromkeys(str(axis.heads) for axis in axes)
        rows.append(
            (name, " / ".join(sizes), " / ".join(heads) if heads != {"1": None} else "", _how(name, reference, align))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    fixed = ", ".join(f"{axis.name} ({axis.size})" for axis in reference.axes.values() if axis.fixed)
    return "\n".join([header, "", *lines, "", f"fixed: {fixed}"])


def _solver(align: AlignConfig) -> str:
    return f"{align.solver} {align.reg:g}" if align.solver == "sinkhorn" else align.solver


def _how(name: str, binding: Binding, align: AlignConfig) -> str:
    if align.stream == "rotation" and any(name in members for members in binding.streams()):
        return "rotation of the stream"
    if name in binding.joins:
        join = binding.joins[name]
        return f"join ({align.residual}) of " + " + ".join((join.skip, join.branch))
    if align.evidence == "weights":
        how = "rows of " + ", ".join(slot.parameter for slot in binding.writers(name))
    else:
        tap = binding.taps[name]
        how = f"{tap.kind} of {tap.target}" if tap.kind != "parameter" else f"values of {tap.target}"
    in_heads = any(name in group for group in binding.attention)
    circuit = next((circuit for circuit in binding.circuits if name in circuit), None)
    if in_heads and align.heads == "matched":
        verb = "rotated" if align.stream == "rotation" else "matched"
        return how + f", heads {verb} in pairs" + (f", with {' and '.join(set(circuit) - {name})}" if circuit else "")
    if circuit and align.qk != "separate":
        return how + f", {align.qk} with {' and '.join(set(circuit) - {name})}"
    return how
