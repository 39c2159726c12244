"""Measures one fusion. `python -m benchmarks.speed.cell REQUEST` does it in a process of its own and prints JSON."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import fusionpl
from benchmarks.common import DEVICE
from benchmarks.speed.memory import watched
from benchmarks.speed.pairs import Shape, write_folder
from benchmarks.speed.plain import plain_fusion
from fusionpl.calibration.batches import unlabelled
from fusionpl.calibration.forward import Batch, logits
from fusionpl.errors import FusionError
from fusionpl.fusion.config import FuseConfig, load_config
from fusionpl.fusion.heads import read

_ROOT = Path(__file__).resolve().parents[2]
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_SURE = 100.0  # times a new head's logits
# Whatever libraries load and allocate once is no part of a fusion's cost.
_WARM_UP = Shape("vit", 16, 1, 2, 16, channels=1)


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        shape: of both parents.
        samples: of the calibration set.
        threads: of the process.
        preset: a file of conf/fuse; None is the plain implementation.
        changes: dotted keys of the configuration.
        folders: the parents' model folders, where they are fused from files: they are written if they are not there.
    """

    shape: Shape
    samples: int
    threads: int
    preset: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    folders: tuple[str, ...] = ()

    @property
    def config(self) -> FuseConfig:
        """The configuration, which uses all samples."""
        return load_config(self.preset, {**self.changes, "calibration.samples": self.samples})


def in_fresh_process(request: Request) -> dict[str, float]:
    """Measures in a process that has done nothing else.

    Raises:
        FusionError: it failed.
    """
    environment = {**os.environ, **dict.fromkeys(_THREADS, str(request.threads))}
    words = [sys.executable, "-m", "benchmarks.speed.cell", json.dumps(asdict(request))]
    done = subprocess.run(words, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise FusionError(f"the measuring process ended with {done.returncode}; what it said stands above")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(request: Request) -> dict[str, float]:
    """Measures in this process.

    Returns:
        `seconds` of the fusion, `extra`, the bytes that it needed beyond what was resident before, and `most`, all that
        were resident at most (on a GPU: allocated there); of models in memory also `forward`, the seconds of both
        parents' forward passes, and `ratio`.
    """
    config = request.config
    if request.folders:
        return _of_folders(request, config)
    parents = [request.shape.model(seed).to(DEVICE) for seed in (1, 2)]
    if config.units == "auto" and request.shape.kind == "vit":
        for parent in parents:
            _make_sure(parent, _batches(request, config))
    _fuse([_WARM_UP.model(seed).to(DEVICE) for seed in (1, 2)], _WARM_UP.batches(2, 2), request, config)
    before = _forward(parents, request, config)
    with watched(DEVICE) as memory:
        start = _now()
        model = _fuse(parents, _batches(request, config), request, config)
        seconds = _now() - start
    del model
    forward = min(before, _forward(parents, request, config))
    return {
        "forward": forward, "seconds": seconds, "ratio": seconds / forward, "extra": memory.extra, "most": memory.most,
    }  # fmt: skip


@torch.no_grad()
def _make_sure(parent: nn.Module, batches: Iterator[Batch]) -> None:
    """Gives a parent a head that is sure of one class or another, each about as often. Such parents disagree on samples
    more than about how often classes occur, so that `units: auto` tries both ways where it has the samples."""
    head = cast(nn.Linear, parent.get_submodule("head"))
    mean = torch.cat([read(parent, head, unlabelled(batch)) for batch in batches]).mean(0)
    head.weight.mul_(_SURE)
    head.bias.copy_(-head.weight @ mean)


def _batches(request: Request, config: FuseConfig) -> Iterator[Batch]:
    return request.shape.batches(request.samples, config.calibration.batch_size)


def _forward(parents: Sequence[nn.Module], request: Request, config: FuseConfig) -> float:
    """The seconds of all parents' forward passes over the calibration set, whose making does not count."""
    seconds = 0.0
    with torch.inference_mode():
        for parent in parents:
            logits(parent, next(_batches(request, config)))  # the first batch is slower
            for batch in _batches(request, config):
                start = _now()
                logits(parent, batch)
                seconds += _now() - start
    return seconds


def _now() -> float:
    """Seconds, once the GPU has done what it was asked for."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _fuse(parents: Sequence[nn.Module], batches: Iterator[Any], request: Request, config: FuseConfig) -> nn.Module:
    if request.preset is None:
        return plain_fusion(parents[0], parents[1], batches)
    return fusionpl.fuse(parents, batches, config).model


def _of_folders(request: Request, config: FuseConfig) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=Path(request.folders[0]).parent) as output, watched(DEVICE) as memory:
        start = _now()
        fusionpl.fuse(request.folders, _batches(request, config), config, output=output, device=DEVICE)
        seconds = _now() - start
    return {"seconds": seconds, "extra": memory.extra, "most": memory.most}


def prepare(request: Request) -> None:
    """Writes the parents' model folders that are not there."""
    for seed, folder in enumerate(map(Path, request.folders), 1):
        if not (folder / "config.json").is_file():
            write_folder(request.shape, seed, folder)


def main(text: str) -> None:
    raw = json.loads(text)
    request = Request(**{**raw, "shape": Shape(**raw["shape"]), "folders": tuple(raw["folders"])})
    torch.set_num_threads(request.threads)
    print(json.dumps(measured(request)))


if __name__ == "__main__":
    main(sys.argv[1])
