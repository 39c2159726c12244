"""What a fusion is compared with: averaging without aligning."""

import copy
from collections.abc import Sequence

from torch import nn

from fusionpl.families import load_parameters
from fusionpl.fusion.average import average, own_state


def vanilla(parents: Sequence[nn.Module], weights: Sequence[float]) -> nn.Module | None:
    """Vanilla fusion: the entry-by-entry weighted mean of the parents' parameters.

    Returns:
        A new model in eval mode, or None when the parents' tensors differ in shape.
    """
    states = [own_state(parent) for parent in parents]
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in states]
    if any(other != shapes[0] for other in shapes[1:]):
        return None
    return load_parameters(copy.deepcopy(parents[0]), average(states, weights)).eval()
