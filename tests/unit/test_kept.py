"""Kept tensors: the same values from memory and from the file, which leaves nothing behind."""

import errno
import gc
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fusionpl
from fusionpl.calibration import kept
from fusionpl.calibration.kept import Kept, budget, free_memory
from fusionpl.errors import FusionError
from tests.models_for_tests import images, timm_vit

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8)
LIMITS = (0, 150, 10**9)  # bytes: nothing, some and everything stays in memory


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (10 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(found, expected)
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], value) for key, value in expected.items())
    if isinstance(expected, (list, tuple)):
        return type(found) is type(expected) and all(map(same, found, expected)) and len(found) == len(expected)
    return bool(found == expected)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_type_comes_back(limit: int, dtype: torch.dtype) -> None:
    store = Kept(limit)
    values = {shape: drawn(*shape, dtype=dtype) for shape in ((), (0,), (3,), (4, 5), (2, 0, 3), (50, 6))}
    for shape, value in values.items():
        store["one", shape] = value
    assert all(same(store["one", shape], value) for shape, value in values.items())
    assert (store.spilled > 0) == (limit < 10**9)


@pytest.mark.parametrize("limit", LIMITS)
def test_what_is_no_number_comes_back(limit: int) -> None:
    store, value = Kept(limit), torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    store["one"] = value
    assert torch.equal(store["one"].view(torch.int32), value.view(torch.int32))


@pytest.mark.parametrize("limit", LIMITS)
def test_tuples_lists_and_dicts_keep_their_form_and_what_is_no_tensor(limit: int) -> None:
    store = Kept(limit)
    value = [((drawn(4), None), {"mask": drawn(3, 5, dtype=torch.bool), "cache": False, "more": [drawn(60)]}), "words"]
    store["call", 3] = value
    assert same(store["call", 3], value)
    assert ("call", 3) in store
    assert ("call", 4) not in store
    assert list(store) == [("call", 3)]


@pytest.mark.parametrize("limit", LIMITS)
def test_views_come_back_as_what_they_show(limit: int) -> None:
    base = drawn(6, 8)
    views = {
        "transposed": base.T, "every other": base[:, ::2], "a row": base[2], "flipped": base.flip(0),
        "expanded": base[0].expand(5, 8), "inner": base.view(6, 2, 4).transpose(0, 1),
    }  # fmt: skip
    store = Kept(limit)
    for name, view in views.items():
        store[name] = view
    assert all(same(store[name], view) for name, view in views.items())


@pytest.mark.parametrize("limit", LIMITS)
def test_a_part_does_not_hold_the_whole(limit: int) -> None:
    whole = drawn(10, 10)
    store, alive = Kept(limit), weakref.ref(whole.untyped_storage())
    store["part"] = whole[:2]
    del whole
    assert alive() is None
    assert same(store["part"], drawn(10, 10)[:2])


@pytest.mark.parametrize("limit", LIMITS)
def test_gradients_are_not_kept(limit: int) -> None:
    store, leaf = Kept(limit), drawn(40).requires_grad_()
    store["one"] = leaf * 2
    assert not store["one"].requires_grad
    assert same(store["one"], drawn(40) * 2)


def test_one_tensor_in_several_places_is_kept_and_counted_once() -> None:
    mask = drawn(10, 10)
    calls = [((), {"mask": mask}) for _ in range(12)]
    for limit, in_memory, on_disk in ((0, 0, 400), (400, 400, 0), (399, 0, 400)):
        store = Kept(limit)
        store["calls"] = calls
        assert (store.used, store.spilled) == (in_memory, on_disk)
        found = store["calls"]
        assert same(found, calls)
        assert len({id(call[1]["mask"]) for call in found}) == 1
        store["calls"] = calls
        assert (store.used, store.spilled) == (in_memory, on_disk)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30), st.sampled_from(TYPES)), max_size=25),
    st.integers(0, 700),
)
@settings(max_examples=60, deadline=None)
def test_it_is_a_dictionary_whatever_is_replaced(steps: list[tuple[int, int, torch.dtype]], limit: int) -> None:
    store, expected = Kept(limit), {}
    for seed, (key, size, dtype) in enumerate(steps):
        if key in expected and size == 30:
            del store[key], expected[key]
            continue
        store[key] = expected[key] = (drawn(size, seed=seed, dtype=dtype), drawn(3, seed=seed))
        assert store.used <= limit
    assert set(store) == set(expected)
    assert all(same(store[key], value) for key, value in expected.items())


@pytest.mark.parametrize("limit", [0, 350])
def test_what_replaces_another_takes_its_place(limit: int) -> None:
    """The stream moves on section by section; the file must not grow with the depth."""
    store = Kept(limit)
    for section in range(8):
        for batch in range(3):
            store["stream", batch] = drawn(30, seed=section)
        if section == 0:
            used, spilled = store.used, store.spilled
    assert (store.used, store.spilled) == (used, spilled)
    assert used + spilled == 3 * 120
    assert all(same(store["stream", batch], drawn(30, seed=7)) for batch in range(3))


@pytest.mark.parametrize("limit", [0, 350, 10**9])
def test_what_is_forgotten_leaves_its_room_to_what_comes(limit: int) -> None:
    store = Kept(limit)
    for section in range(8):
        for batch in range(3):
            store["target", section, batch] = drawn(30, seed=section), drawn(2, seed=batch)
        if section == 0:
            used, spilled = store.used, store.spilled
        elif section < 7:
            assert all(same(store["target", section, batch][0], drawn(30, seed=section)) for batch in range(3))
        if section < 7:
            for batch in range(3):
                del store["target", section, batch]
            assert store.used == 0
    assert (store.used, store.spilled) == (used, spilled)
    assert len(list(store)) == 3
    assert all(same(store["target", 7, batch], (drawn(30, seed=7), drawn(2, seed=batch))) for batch in range(3))
    with pytest.raises(KeyError):
        del store["target", 0, 0]


def test_what_was_read_does_not_change_with_its_place() -> None:
    store = Kept(0)
    store["one"] = drawn(5, seed=1)
    found = store["one"]
    store["one"] = drawn(5, seed=2)
    assert same(found, drawn(5, seed=1))
    found.zero_()
    assert same(store["one"], drawn(5, seed=2))


def test_what_is_replaced_is_freed() -> None:
    store = Kept(10**9)
    first = drawn(5)
    alive = weakref.ref(first)
    store["one"] = first
    del first
    store["one"] = drawn(7)
    assert alive() is None
    assert store.used == 28


# the file


def test_the_temporary_file_has_no_name(temporary: Path) -> None:
    store = Kept(0)
    store["one"] = drawn(1000)
    assert list(temporary.iterdir()) == []
    assert any(str(temporary) in target for target in open_files()), "it lies in $TMPDIR all the same"
    del store
    assert not any(str(temporary) in target for target in open_files())


def open_files() -> list[str]:
    links = (Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
    return [os.readlink(link) for link in links if link.is_symlink()]


def test_nothing_is_written_while_there_is_room_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", None)
    store = Kept(4000)
    store["one"] = drawn(1000)
    assert (store.used, store.spilled) == (4000, 0)


def test_a_fusion_that_fails_leaves_no_file(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        assert any(str(temporary) in target for target in open_files())
        raise RuntimeError("in the middle")

    monkeypatch.setattr("fusionpl.fusion.sections.averaged", fails)
    config = fusionpl.load_config(None, {"calibration.memory": 0})
    with pytest.raises(RuntimeError, match="in the middle"):
        fusionpl.fuse([timm_vit(seed, depth=1) for seed in range(2)], [images(4)], config)
    assert list(temporary.iterdir()) == []
    gc.collect()
    assert not any(str(temporary) in target for target in open_files())


class Full:
    """A file on a disk that has no room."""

    def __init__(self, number: int) -> None:
        self.number = number

    def seek(self, _: int) -> None:
        pass

    def write(self, _: Any) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line(number: int, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: Full(number))
    with pytest.raises(FusionError) as caught:
        Kept(0)["one"] = torch.zeros(2**20, dtype=torch.uint8)
    assert str(temporary) in str(caught.value)
    assert os.strerror(number) in str(caught.value)
    assert "set TMPDIR to a folder with more" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_to_is_one_line(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses() -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuses)
    with pytest.raises(FusionError, match=r"\(Permission denied\); set TMPDIR"):
        Kept(0)["one"] = drawn(3)


def test_a_full_disk_keeps_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Kept(0)
    store["one"] = drawn(30, seed=1)
    file = store._file
    monkeypatch.setattr(store, "_file", Full(errno.ENOSPC))
    with pytest.raises(FusionError, match="no room"):
        store["two"] = drawn(30, seed=2)
    monkeypatch.setattr(store, "_file", file)
    assert same(store["one"], drawn(30, seed=1))
    assert "two" not in store


# how much there is


def test_a_budget_that_is_said_is_taken() -> None:
    assert budget(0) == 0
    assert budget(0.5) == 2**28  # activations and maps share it
    assert budget(2) == 2**30


def test_the_default_budget_is_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(kept, "free_memory", lambda _="cpu": 1000)
    assert budget(None) == 125
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert budget(None) == 25
    assert budget(1.0) == 2**29


def test_free_memory_is_some_of_this_machine() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_memory() < total


def test_free_memory_keeps_to_the_control_group_and_counts_no_file_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 8000 kB\nMemAvailable:    6000 kB\n",
        "/sys/fs/cgroup/memory.max": "3000000\n",
        "/sys/fs/cgroup/memory.current": "2000000\n",
        "/sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 500000\n",
    }

    def read(path: Path, *_: Any, **__: Any) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    assert free_memory() == 3000000 - 1500000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert free_memory() == 6000 * 1024
    files["/sys/fs/cgroup/memory.max"] = "1000000\n"
    assert free_memory() == 0, "over its limit"
    del files["/sys/fs/cgroup/memory.max"], files["/proc/meminfo"]
    assert free_memory() > 0, "no Linux"
