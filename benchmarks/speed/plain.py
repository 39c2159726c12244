"""The published recipe done plainly, as its released code goes about it, in our own words: what speed is compared with.

Both models run on one sample after the other while hooks keep all activations; then the units of each axis are
standardised, all pairs compared by their Euclidean distance, and one transport problem solved an axis. It computes what
conf/fuse/paper.yaml asks for, for two timm ViTs of one width, and nothing else. As in the released code the hooks copy
what every module puts out.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import ot
import torch
from torch import Tensor, nn

WINDOW, REG = 6, 0.08


def plain_fusion(parent: nn.Module, anchor: nn.Module, images: Iterable[Tensor]) -> nn.Module:
    """Aligns `parent` to `anchor` and averages the two.

    Args:
        parent, anchor: timm VisionTransformers of one shape, with a class token.
        images: batches [B, C, H, W].
    """
    images = list(images)
    with torch.no_grad():
        first, second = (stored(model, images) for model in (parent, anchor))
        aligned = _aligned(parent, anchor, first, second)
        fused = copy.deepcopy(anchor)
        for name, parameter in fused.named_parameters():
            parameter.copy_((aligned[name] + parameter) / 2)
    return fused.eval()


def stored(model: nn.Module, images: Iterable[Tensor]) -> dict[str, Tensor]:
    """The outputs of all modules, each [samples, ...], from runs on one sample at a time."""
    found: dict[str, list[Tensor]] = defaultdict(list)

    def keep(name: str) -> Any:
        return lambda module, args, output: found[name].append(output.clone())

    hooks = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
    model.eval()
    for batch in images:
        for image in batch:
            model(image[None])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(outputs) for name, outputs in found.items()}


def units(output: Tensor) -> Tensor:
    """One standardised row a unit: [n, rows] from [samples, tokens, n] or, of the patches, [samples, n, h, w]."""
    if output.ndim == 4:
        rows = output.flatten(2).transpose(1, 2).flatten(0, 1)
    else:
        rows = output[:, _window(output.shape[1])].flatten(0, 1)
    return ((rows - rows.mean(0)) / (rows.std(0) + 1e-9)).T.contiguous()


def transport(parent: Tensor, anchor: Tensor) -> Tensor:
    """The map between two sets of units [n, features], each of its columns and rows summing to 1."""
    cost = torch.cdist(parent, anchor).double()
    cost = cost / cost.max()
    n = len(cost)
    uniform = torch.full((n,), 1 / n, dtype=cost.dtype).numpy()
    plan = ot.sinkhorn(uniform, uniform, cost.numpy(), REG)
    return torch.from_numpy(plan).to(parent) * n


def _window(length: int) -> Tensor:
    """The class token and the WINDOW x WINDOW patches in the middle."""
    side = round((length - 1) ** 0.5)
    start = (side - WINDOW) // 2
    grid = torch.arange(side * side).view(side, side)[start : start + WINDOW, start : start + WINDOW]
    return torch.cat([torch.zeros(1, dtype=torch.long), 1 + grid.flatten()])


def _aligned(model: Any, anchor: Any, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's parameters in the anchor's units, block by block."""
    state, other = (dict(one.named_parameters()) for one in (model, anchor))
    done: dict[str, Tensor] = {}

    def solved(module: str, part: slice = slice(None)) -> Tensor:
        return transport(*(units(outputs[module][..., part]) for outputs in (ours, theirs)))

    def write(module: str, into: Tensor, reads: Tensor | None = None) -> None:
        weight, bias = state[f"{module}.weight"], state[f"{module}.bias"]
        done[f"{module}.bias"] = into.T @ bias
        done[f"{module}.weight"] = into.T @ (weight if reads is None else weight @ reads)

    patch = transport(*(units(outputs["patch_embed.proj"]) for outputs in (ours, theirs)))
    place, token = (transport(state[name][0].T, other[name][0].T) for name in ("pos_embed", "cls_token"))
    done["pos_embed"], done["cls_token"] = state["pos_embed"] @ place, state["cls_token"] @ token
    kernel = state["patch_embed.proj.weight"]
    done["patch_embed.proj.weight"] = (patch.T @ kernel.flatten(1)).view_as(kernel)
    done["patch_embed.proj.bias"] = patch.T @ state["patch_embed.proj.bias"]
    stream = (patch + place) / 2
    for index in range(len(model.blocks)):
        at = f"blocks.{index}"
        write(f"{at}.norm1", stream)
        width = len(state[f"{at}.attn.qkv.bias"]) // 3
        parts = [solved(f"{at}.attn.qkv", slice(i * width, (i + 1) * width)) for i in range(3)]
        write(f"{at}.attn.qkv", torch.block_diag(*parts), stream)
        attention = solved(f"{at}.attn.proj")
        write(f"{at}.attn.proj", attention, parts[2])
        stream = (stream + attention) / 2
        write(f"{at}.norm2", stream)
        hidden = solved(f"{at}.mlp.fc1")
        write(f"{at}.mlp.fc1", hidden, stream)
        branch = solved(f"{at}.mlp.fc2")
        write(f"{at}.mlp.fc2", branch, hidden)
        stream = (stream + branch) / 2
    write("norm", stream)
    done["head.weight"], done["head.bias"] = state["head.weight"] @ stream, state["head.bias"]
    return done
