"""The examples of docstrings run as they stand."""

import doctest
import importlib
from pathlib import Path

import pytest

import fusionpl

ROOT = Path(fusionpl.__file__).parent
MODULES = [path for path in sorted(ROOT.rglob("*.py")) if ">>>" in path.read_text()]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_are_true(path: Path) -> None:
    module = importlib.import_module(".".join(("fusionpl", *path.relative_to(ROOT).with_suffix("").parts)))
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
