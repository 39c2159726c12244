"""Largest differences between fusionpl and the paper's released code, run on the same parents.

    python -m benchmarks.reference_vectors [--oracle DIR] [--output docs/reference_vectors.md]

The recorded runs are described in the oracle's README; the folder is $FUSIONPL_ORACLE or ../shared/oracle.
"""

import argparse
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fusionpl.alignment.config import AlignConfig
from fusionpl.calibration.config import CalibrationConfig
from fusionpl.errors import FusionError
from fusionpl.fusion.config import FuseConfig
from fusionpl.fusion.fuse import fuse
from fusionpl.fusion.result import FusionResult
from fusionpl.models.load import load_model
from fusionpl.transport.solvers import solve

CLASS_TOKEN = "stem.cls"
RESIDUAL = {"mean": "average", "no_resid": "branch", "only_resid": "skip", "resid_as_identity": "identity"}
QK = {"separate": "separate", "eq_t_map": "shared", "joint": "joint"}
STEM = {"cls_token": "stem.cls", "position_embeddings": "stem.pos", "patch_embeddings": "stem.patch"}
BLOCK = {
    "attention.attention.query": "q",
    "attention.attention.key": "k",
    "attention.attention.value": "v",
    "attention.output.dense": "attn",
    "intermediate.dense": "ffn",
    "output.dense": "mlp",
}

HEADER = """# Reference vectors

Largest absolute difference between fusionpl and what the paper's released code computed from the same parents and
images. Written by `python -m benchmarks.reference_vectors --output docs/reference_vectors.md`. Left out: the class
token where its one-dimensional problem has many near-optimal plans (hard solvers, weights as evidence), and block 0's
Q, K and V maps where calibration sees the class token alone, which is the same for every image.
"""


def oracle_folder() -> Path:
    """$FUSIONPL_ORACLE, else shared/oracle beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "oracle"
    return Path(os.environ.get("FUSIONPL_ORACLE", beside))


@dataclass(frozen=True)
class Vector:
    """One recorded run of the released code."""

    folder: Path
    args: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @functools.cached_property
    def config(self) -> FuseConfig:
        """Its options in our keys; FusionError for one that is not reproduced."""
        return fuse_config(self.args)

    @property
    def hard(self) -> bool:
        """Whether its plans are exact optima rather than entropic."""
        return self.config.align.solver != "sinkhorn"

    @property
    def weight_tolerance(self) -> float:
        """The largest difference of fused weights that counts as agreement."""
        return 1e-5 if self.hard else 1e-4

    @property
    def map_tolerance(self) -> float:
        """The same for maps as used: hard ones are equal up to the rounding of a weighted join."""
        return 1e-6 if self.hard else 1e-4

    @property
    def solver_tolerance(self) -> float:
        """The same for plans from a recorded ground metric: hard ones are equal up to the rounding of masses."""
        return 1e-12 if self.hard else 1e-6

    @property
    def class_token_compared(self) -> bool:
        """Whether the one-dimensional problem of the class token has one clear optimum."""
        return not self.hard and self.config.align.evidence == "activations"

    def left_out(self, axis: str) -> bool:
        """Whether the maps of `axis` are not compared."""
        # Block 0 sees the same class token whatever the image: with that token alone all units are dead, and the
        # reference's cost is the rounding error of a float32 mean divided by 1e-9.
        dead = self.config.calibration.tokens == "class" and re.fullmatch(r"vit\.layers\.0\.[qkv]", axis)
        return bool(dead) or (axis == CLASS_TOKEN and not self.class_token_compared)

    def parameter_left_out(self, parameter: str) -> bool:
        """Whether a fused parameter is not compared, because a map that is left out moves it."""
        moved_by = {
            "vit.embeddings.cls_token": CLASS_TOKEN,
            "vit.layers.0.attention.q_proj": "vit.layers.0.q",
            "vit.layers.0.attention.k_proj": "vit.layers.0.k",
            "vit.layers.0.attention.v_proj": "vit.layers.0.v",
            "vit.layers.0.attention.o_proj.weight": "vit.layers.0.v",
        }
        return any(parameter.startswith(prefix) and self.left_out(axis) for prefix, axis in moved_by.items())


@dataclass(frozen=True)
class Difference:
    """The largest absolute differences of a run, each with the name of what differs most."""

    weights: float
    weight: str
    maps: float
    map: str
    solver: float
    problem: str


def fuse_config(args: Mapping[str, Any]) -> FuseConfig:
    """The oracle's args.json in our keys.

    Raises:
        FusionError: an option that is not reproduced, and why.
    """
    fusion = args["fusion"]
    acts, metric = fusion["acts"], fusion["gnd_metric"]
    if fusion["type"] == "acts" and fusion["qk_fusion"] == "joint":
        raise FusionError("joint q/k from activations: the reference swaps the order of Q and K")
    if len(args["parents"]) > 2:
        raise FusionError("more than two parents: the reference weighs them unevenly")
    off = [key for key in ("fuse_sa", "fuse_norm", "fuse_fc", "fuse_bias") if not fusion[key]]
    if off or metric["clip"] or metric["type"] != "euclidean":
        raise FusionError(f"not an option here: {', '.join(off) or metric['type']}{', clip' * metric['clip']}")
    if fusion["type"] == "wts":
        scale = "normalize" if fusion["wts"]["norm"] else "none"
    else:
        chain = {"standardize": acts["std"], "center": acts["center"], "normalize": acts["norm"], "none": True}
        scale = next(name for name, chosen in chain.items() if chosen)
    selected = acts["seq_filter"] or "all"
    tokens = "mean" if acts["avg_seq_items"] else {"only_cls": "class"}.get(selected, selected.replace("_", ":"))
    last = len(args["parents"]) - 1
    return FuseConfig(
        anchor=last - args["parents"][::-1].index(args["anchor"]),
        calibration=CalibrationConfig(samples=acts["num_samples"], tokens=tokens, scale=scale),  # type: ignore[arg-type]
        align=AlignConfig(
            evidence="weights" if fusion["type"] == "wts" else "activations",
            metric="sqeuclidean" if metric["squared"] else "euclidean",
            normalize=metric["norm"] or "none",
            solver=fusion["ot_solver"],
            reg=fusion["sinkhorn_reg"],
            residual=RESIDUAL.get(fusion["resid_policy"], fusion["resid_policy"]),
            qk=QK[fusion["qk_fusion"]],  # type: ignore[arg-type]
            scaling="source",
            embeddings=fusion["fuse_src_embed"],
            classifier=fusion["fuse_gen"],
        ),
    )


def axis_of(layer: str) -> str:
    """Our axis for a layer of maps.safetensors."""
    joined = re.fullmatch(r"resid_(\d+)", layer)
    if joined:
        index = int(joined[1]) - 1
        return "stem.out" if index < 0 else f"vit.layers.{index // 2}.{('mid', 'out')[index % 2]}"
    block = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", layer)
    return f"vit.layers.{block[1]}.{BLOCK[block[2]]}" if block else STEM[layer.split(".")[1]]


def vectors(oracle: Path) -> list[Vector]:
    """All recorded runs, by name; empty where the folder does not exist."""
    files = sorted((oracle / "vectors").glob("*/args.json"))
    return [Vector(file.parent, json.loads(file.read_text())) for file in files]


def run(vector: Vector) -> FusionResult:
    """Fuses the vector's parents with its options."""
    oracle = vector.folder.parents[1]
    parents = [load_model(oracle / "parents" / name) for name in vector.args["parents"]]
    calibration = load_file(oracle / "data" / "calib200.safetensors")["pixel_values"]
    return fuse(parents, [calibration], vector.config, names=vector.args["parents"])


def reference_model(vector: Vector) -> nn.Module:
    """The fused model that the released code saved."""
    with tempfile.TemporaryDirectory() as folder:
        anchor = vector.folder.parents[1] / "parents" / vector.args["anchor"]
        shutil.copy(anchor / "config.json", folder)
        shutil.copy(vector.folder / "fused.safetensors", Path(folder) / "model.safetensors")
        return load_model(folder)


def compare(vector: Vector) -> Difference:
    """Runs a vector and compares its weights, its maps, and the solver alone on the recorded ground metrics."""
    result = run(vector)
    recorded = load_file(vector.folder / "maps.safetensors")
    fused = dict(result.model.named_parameters())
    weights = [
        (_largest(tensor.detach() - fused[name].detach()), name)
        for name, tensor in reference_model(vector).named_parameters()
        if not vector.parameter_left_out(name)
    ]
    maps, solved = [], []
    for key, tensor in recorded.items():
        kind, _, layer = key.split("/")
        axis = axis_of(layer)
        if kind == "ground_metric":
            align = vector.config.align
            plan = solve(tensor, align.solver, reg=align.reg, scaling="source").to_output
            solved.append((_largest(plan - recorded[key.replace("ground_metric", "t_out")]), layer))
        elif not vector.left_out(axis):
            maps.append((_largest(_map(result, axis, tensor) - tensor), axis))
    return Difference(*max(weights), *max(maps), *max(solved))


def _largest(difference: Tensor) -> float:
    return float(difference.float().abs().max())


def _map(result: FusionResult, axis: str, like: Tensor) -> Tensor:
    found = result.maps[axis]
    if found.plan.shape == like.shape:
        return found.to_output.float()
    (alignment,) = [one for one in result.alignments if one]
    return next(one for pair, one in alignment.joint.items() if axis in pair).to_output.float()


def table(found: Iterable[Vector]) -> str:
    """A Markdown table, a row a vector."""
    lines = [
        "| vector | fused weights | worst tensor | maps | worst axis | solver alone |",
        "|---|---|---|---|---|---|",
    ]
    for vector in found:
        try:
            one = compare(vector)
        except FusionError as error:
            lines.append(f"| {vector.name} | left out | {error} | | | |")
            continue
        lines.append(
            f"| {vector.name} | {one.weights:.1e} | {one.weight} | {one.maps:.1e} | {one.map} | {one.solver:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--oracle", type=Path, default=oracle_folder(), help="folder with parents/, data/, vectors/")
    parser.add_argument("--output", type=Path, help="Markdown file to write instead of printing")
    options = parser.parse_args()
    found = vectors(options.oracle)
    if not found:
        parser.error(f"no vectors under {options.oracle}; name the oracle's folder with --oracle")
    torch.set_grad_enabled(False)
    text = f"{HEADER}\n{table(found)}\n"
    if options.output:
        options.output.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
