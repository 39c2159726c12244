"""The table of proofs has every family of the library."""

from pathlib import Path

from benchmarks.proofs import BUILDERS, run
from fusionpl.families.family import library


def test_every_family_of_the_library_has_a_row() -> None:
    assert {name.partition(" ")[0] for name in BUILDERS} == set(library())


def test_a_table_is_written(tmp_path: Path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("benchmarks.proofs.BUILDERS", {"gpt2": BUILDERS["gpt2"]})
    run(["--output", str(tmp_path / "proofs.md")])
    line = next(one for one in (tmp_path / "proofs.md").read_text().splitlines() if one.startswith("| `gpt2`"))
    error = float(line.split("|")[4])
    assert 0 < error < 1e-5
