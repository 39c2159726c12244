"""What a fusion costs: forward passes, memory for the streams, parameters held at once. All must be linear in depth."""

import gc
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusionpl
from fusionpl.calibration.forward import logits
from fusionpl.calibration.kept import Kept
from fusionpl.calibration.moments import Moments
from fusionpl.families.binding import bind
from fusionpl.families.family import STEM
from fusionpl.fusion import fuse, walk
from fusionpl.fusion.fuse import prepare
from fusionpl.models.save import save_model
from fusionpl.models.tensors import Tensors
from fusionpl.presets import CONF
from tests.integration.runs import make_run
from tests.models_for_tests import FAMILIES, TEXT_MODELS, images, largest_difference, sentences, text_model, timm_vit

ALL = (*FAMILIES, *TEXT_MODELS)
ROTATION = {
    "align.stream": "rotation", "align.residual": "tie", "align.heads": "matched", "align.solver": "assignment",
}  # fmt: skip
# preset, changes, number of parents, walks through the parents
SETTINGS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "paper": ("paper", {"calibration.tokens": "all"}, 2, 1),
    "default": ("default", {}, 2, 1),
    "tie": ("default", {"align.residual": "tie"}, 2, 2),
    "tie, no refit": ("paper", {"calibration.tokens": "all", "align.residual": "tie"}, 2, 2),
    "rotation": ("default", ROTATION, 2, 2),
    "three parents": ("default", {"weights": [0.5, 0.25, 0.25]}, 3, 1),
    "weights, refit": ("default", {"align.evidence": "weights"}, 2, 1),
    "weights": ("paper", {"align.evidence": "weights"}, 2, 0),
}
TEXT_SETTINGS = ("default", "tie", "three parents")
SOFT = {"align.solver": "sinkhorn", "align.reg": 0.08}
BATCHES = 2


def config_of(preset: str = "default", **changes: Any) -> fusionpl.FuseConfig:
    # Sinkhorn at 0.02 takes longer than all else on models of this size, and has no say in what is asked here.
    return fusionpl.load_config(CONF / "fuse" / f"{preset}.yaml", {"anchor": 0, "align.solver": "emd", **changes})


def model_of(name: str, seed: int = 0, **options: Any) -> nn.Module:
    return FAMILIES[name](seed, **options) if name in FAMILIES else text_model(name, seed, **options)


def batch_of(name: str, count: int = 12) -> dict[str, Tensor]:
    return {"pixel_values": images(count)} if name in FAMILIES else sentences(count)


@contextmanager
def counted(models: list[nn.Module]) -> Iterator[Counter[tuple[int, str]]]:
    """(model, section) -> how often its block, or the first module of its stem, is really run."""
    counts: Counter[tuple[int, str]] = Counter()
    hooks = []
    for index, model in enumerate(models):
        binding = bind(model)
        for path in binding.blocks:
            inner = next(child for child in model.get_submodule(path).children() if not isinstance(child, nn.Identity))

            def count(*_: Any, key: tuple[int, str] = (index, path)) -> None:
                counts[key] += 1

            hooks.append(inner.register_forward_pre_hook(count))
        stem = next(tap.target for axis, tap in binding.taps.items()
                    if axis.startswith(f"{STEM}.") and tap.kind == "output")  # fmt: skip

        def enter(*_: Any, key: tuple[int, str] = (index, STEM)) -> None:
            counts[key] += 1

        hooks.append(model.get_submodule(stem).register_forward_pre_hook(enter))
    yield counts
    for hook in hooks:
        hook.remove()


def passes(name: str, setting: str, depth: int) -> Counter[tuple[int, str]]:
    """Runs of each section in a whole fusion, a batch."""
    preset, changes, count, _ = SETTINGS[setting]
    parents = [model_of(name, seed, depth=depth) for seed in range(count)]
    with counted(parents) as counts:
        fusionpl.fuse(parents, [batch_of(name, 8)], config_of(preset, **{"calibration.batch_size": 4, **changes}))
    assert all(number % BATCHES == 0 for number in counts.values())
    return Counter({key: number // BATCHES for key, number in counts.items()})


@pytest.mark.parametrize(
    ("name", "setting"),
    [*(("vit_timm", one) for one in SETTINGS), *(("bert classifier", one) for one in TEXT_SETTINGS)],
)
def test_a_block_runs_once_a_walk_and_the_fused_one_once_a_stage(name: str, setting: str) -> None:
    preset, changes, count, walks = SETTINGS[setting]
    found = passes(name, setting, depth=2)
    if preset == "default" and "bert" in name:
        walks = 2  # its stream is tied, so it is seen first
    config = config_of(preset, **changes)
    plan = prepare([model_of(name) for _ in range(count)], config).plan
    # What is folded is run beside what it is made of, on the first batch of two.
    checks = 2 / BATCHES if config.canonical else 0
    for section in plan.sections[1:-1]:
        assert {found[index, section.name] for index in range(1, count)} == {walks + checks}
        fits = len(section.groups) + 1 if section.groups else 0
        assert found[0, section.name] <= walks + checks + fits  # the fused block is run in the anchor's module
    refits = any(section.groups for section in plan.sections)
    ends = len(plan.sections[0].groups) + len(plan.sections[-1].groups)
    assert max(found[index, STEM] for index in range(1, count)) <= (walks + 1 + 2 * checks if walks else 0)
    assert found[0, STEM] <= walks + 1 + 2 * checks + (1 + ends if refits else 0)


@pytest.mark.parametrize(
    ("name", "setting"),
    [("vit_timm", "default"), ("vit_hf", "tie"), ("bert classifier", "tie"), ("roberta masked-lm", "default"),
     ("distilbert masked-lm", "tie")],
)  # fmt: skip
def test_twice_the_depth_is_twice_the_passes(name: str, setting: str) -> None:
    shallow, deep = (passes(name, setting, depth) for depth in (2, 4))
    blocks = [{count for (index, section), count in found.items() if index == 1 and section != STEM}
              for found in (shallow, deep)]  # fmt: skip
    assert blocks[0] == blocks[1]
    totals = [sum(count for (_, section), count in found.items() if section != STEM) for found in (shallow, deep)]
    assert totals[1] == 2 * totals[0]
    assert [shallow[index, STEM] for index in range(2)] == [deep[index, STEM] for index in range(2)]


def test_the_calibration_set_is_read_once() -> None:
    class Once:
        rounds = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.rounds += 1
            yield from images(12).split(4)

    for setting in ("default", "tie", "rotation"):
        preset, changes, count, _ = SETTINGS[setting]
        calibration = Once()
        fusionpl.fuse([timm_vit(seed) for seed in range(count)], calibration, config_of(preset, **changes))
        assert calibration.rounds == 1, setting


def reused(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Batches that are written into the same memory, one after the other."""
    buffer = {key: torch.empty_like(value[:4]) for key, value in batch.items()}
    for start in range(0, 12, 4):
        for key, value in batch.items():
            buffer[key].copy_(value[start : start + 4])
        yield buffer


@pytest.mark.parametrize("memory", [0, 8])
@pytest.mark.parametrize("name", ["vit_timm", "bert classifier"])
def test_batches_may_be_written_into_one_buffer(name: str, memory: int) -> None:
    parents, batch = [model_of(name, seed) for seed in range(2)], batch_of(name)
    if "attention_mask" in batch:
        batch["attention_mask"] = batch["attention_mask"].bool()
    config = config_of(**{"calibration.memory": memory, "calibration.batch_size": 4})
    one, other = (fusionpl.fuse(parents, given, config).model for given in ([batch], reused(batch)))
    assert_identical(one, other)


# streams


def assert_identical(first: nn.Module, second: nn.Module) -> None:
    assert largest_difference(first, second) == 0


@pytest.mark.parametrize("name", ALL)
def test_streams_on_disk_give_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parents, spilled = [model_of(name, seed) for seed in range(2)], []
    read = Kept._read
    monkeypatch.setattr(Kept, "_read", lambda self, place: spilled.append(place) or read(self, place))
    whole, cut = (
        fusionpl.fuse(parents, [batch_of(name)], config_of(**{"calibration.memory": gib, "align.residual": "tie"}))
        for gib in (8, 0)
    )
    assert_identical(whole.model, cut.model)
    assert spilled
    for axis, one in whole.maps.items():
        assert torch.equal(one.plan, cut.maps[axis].plan)


def test_streams_partly_on_disk_give_the_same_bits() -> None:
    parents = [timm_vit(seed) for seed in range(2)]
    for setting in ("default", "rotation"):
        preset, changes, _, _ = SETTINGS[setting]
        batches = list(images(24).split(5))
        whole, cut = (
            fusionpl.fuse(parents, batches, config_of(preset, **{"calibration.memory": gib, **changes}))
            for gib in (8, 2e-5)
        )
        assert_identical(whole.model, cut.model)


@pytest.mark.parametrize("name", ["vit_timm", "bert masked-lm"])
def test_streams_in_half_precision_give_nearly_the_same_model(name: str) -> None:
    parents = [model_of(name, seed) for seed in range(2)]
    full, half = (
        fusionpl.fuse(parents, [batch_of(name, 64)], config_of(**{"calibration.dtype": dtype, **SOFT})).model
        for dtype in ("float32", "bfloat16")
    )
    assert {tensor.dtype for tensor in half.parameters()} == {torch.float32}
    assert largest_difference(full, half) > 0, "they are the same: nothing was kept in half precision"
    test = batch_of(name, 16)
    with torch.no_grad():
        first, second = (logits(model, test) for model in (full, half))
    assert float((first - second).norm() / first.norm()) < 0.1


class Watched(Kept):
    """Remembers the largest amount that was kept at once."""

    most: dict[int, int] = {}  # noqa: RUF012

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self.most[id(self)] = max(self.most.get(id(self), 0), self.used + self.spilled)


@pytest.mark.parametrize("memory", [0, 8])
def test_what_is_kept_does_not_grow_with_the_depth(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    most = []
    for depth in (2, 4):
        watched: list[Watched] = []
        monkeypatch.setattr(fuse, "Kept", lambda limit, found=watched: found.append(Watched(limit)) or found[-1])
        Watched.most = {}
        parents = [timm_vit(seed, depth=depth) for seed in range(2)]
        fusionpl.fuse(parents, [images()], config_of(**{"calibration.memory": memory}))
        most.append(Watched.most[id(watched[0])])  # the other one keeps maps, of which there are more in more blocks
    assert most[0] == most[1]


def test_streams_are_freed_with_the_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    init = Kept.__init__

    def watched(self: Kept, limit: int) -> None:
        made.append(weakref.ref(self))
        init(self, limit)

    monkeypatch.setattr(Kept, "__init__", watched)
    result = fusionpl.fuse([timm_vit(seed) for seed in range(2)], [images()], config_of())
    gc.collect()
    streams, _, maps = made
    assert streams() is None, "the result does not hold the activations"
    assert maps() is not None
    assert result.maps["blocks.0.ffn"].plan.shape == (24, 24)


# parameters


@pytest.mark.parametrize(
    ("kind", "setting"),
    [("timm", "default"), ("timm", "weights"), ("transformers", "paper"), ("transformers", "rotation")],
)
def test_one_block_of_each_parent_is_in_memory(
    kind: str, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what was read, nothing of other sections is alive when a block is begun."""
    depth = 3
    for seed in range(2):
        if kind == "timm":
            make_run(tmp_path / str(seed), seed, depth=depth)
        else:
            save_model(FAMILIES["vit_hf"](seed, depth=depth), tmp_path / str(seed) / "model")
    alive: list[tuple[Path, str, weakref.ref[Tensor]]] = []
    met: list[int] = []
    read = Tensors.__getitem__

    def block_of(name: str) -> str:
        return next((part for part in name.split(".") if part.isdigit()), "")

    def watched(self: Tensors, name: str) -> Tensor:
        folder = self.entries[name].file.parent
        others = {block_of(other) for one, other, ref in alive if one == folder and ref() is not None} - {""}
        met.append(len(others - {block_of(name)}))
        found = read(self, name)
        alive.append((folder, name, weakref.ref(found)))
        return found

    monkeypatch.setattr(Tensors, "__getitem__", watched)
    preset, changes, _, _ = SETTINGS[setting]
    pictures = torch.randn(12, 1 if kind == "timm" else 3, 16, 16, generator=torch.Generator().manual_seed(0))
    fusionpl.fuse([tmp_path / "0", tmp_path / "1"], [pictures], config_of(preset, **changes), output=tmp_path / "fused")
    assert len(met) > 2 * depth * 10
    assert max(met) == 0


@pytest.mark.parametrize("setting", ["default", "tie", "rotation"])
def test_moments_of_one_section_are_in_memory(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Moments]] = []
    met: list[int] = []
    made, observe = Moments.zeros.__func__, walk.observe  # type: ignore[attr-defined]

    def zeros(*args: Any, **keywords: Any) -> Moments:
        found: Moments = made(Moments, *args, **keywords)
        alive.append(weakref.ref(found))
        return found

    def watched(*args: Any, **keywords: Any) -> Any:
        met.append(sum(ref() is not None for ref in alive))
        return observe(*args, **keywords)

    monkeypatch.setattr(Moments, "zeros", zeros)
    monkeypatch.setattr(walk, "observe", watched)
    preset, changes, _, _ = SETTINGS[setting]
    fusionpl.fuse([timm_vit(seed) for seed in range(2)], [images()], config_of(preset, **changes))
    assert len(alive) > 10
    assert set(met) == {0}


def test_the_default_temporary_folder_is_left_as_it_was() -> None:
    before = set(Path(tempfile.gettempdir()).iterdir())
    fusionpl.fuse([timm_vit(seed) for seed in range(2)], [images()], config_of(**{"calibration.memory": 0}))
    assert {path for path in set(Path(tempfile.gettempdir()).iterdir()) - before if path.is_file()} == set()
