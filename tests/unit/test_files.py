"""What is written is there whole or not at all."""

from pathlib import Path

import pytest

from fusionpl.files import whole


def write(new: Path, text: str, *, folder: bool) -> None:
    if folder:
        new.mkdir()
    (new / "file" if folder else new).write_text(text)


def interrupted(new: Path, *, folder: bool) -> None:
    write(new, "half", folder=folder)
    raise KeyboardInterrupt


def read(path: Path) -> str:
    return (path / "file" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("folder", [False, True])
def test_the_old_or_the_new_and_nothing_else(tmp_path: Path, *, folder: bool) -> None:
    path = tmp_path / "above" / "it"
    for text in ("old", "new"):
        with pytest.raises(KeyboardInterrupt), whole(path) as new:
            interrupted(new, folder=folder)
        assert [read(one) for one in tmp_path.rglob("it")] == ([] if text == "old" else ["old"])
        with whole(path) as new:
            write(new, text, folder=folder)
            assert not list(tmp_path.rglob("it")) or read(path) == "old"
        assert read(path) == text
        assert [one.name for one in tmp_path.iterdir()] == ["above"]
        assert [one.name for one in path.parent.iterdir()] == ["it"]


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_process_left_goes(tmp_path: Path, *, folder: bool) -> None:
    path = tmp_path / "it"
    held = whole(path)
    write(held.__enter__(), "half", folder=folder)
    left = [one.name for one in tmp_path.iterdir()]
    with whole(path) as new:
        assert [one.name for one in tmp_path.iterdir()] == left
        write(new, "whole", folder=folder)
    assert [one.name for one in tmp_path.iterdir()] == ["it"]
    assert read(path) == "whole"


def test_a_folder_that_cannot_be_moved_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError("cannot be moved")
        return rename(self, target)

    path = tmp_path / "it"
    write(path, "old", folder=True)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="moved"), whole(path) as new:
        write(new, "new", folder=True)
    assert read(path) == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["it"]
