"""Damaged files are read, or refused in a line: `make campaign` tries thousands, `make test` a few of each."""

import os
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch

from fusionpl.models.save import save_model
from fusionpl.models.tokenizers import train_wordpiece
from tests.campaign.mutations import Target, targets, tried
from tests.integration.runs import make_run
from tests.models_for_tests import text_model

FEW = 12


def run(folder: Path) -> None:
    make_run(folder, 0)


def text(folder: Path) -> None:
    torch.manual_seed(0)
    words = ["the cat sat on the mat and saw a bird in the tree"] * 20
    save_model(text_model("bert masked-lm"), folder / "model", tokenizer=train_wordpiece(words, 100))


TARGETS = targets(run, text)


def survived(target: Target, home: Path, count: int) -> Counter[str]:
    target.make(home / "whole")
    target.read(home / "whole")
    found: Counter[str] = Counter()
    for seed in range(count):
        try:
            found[tried(target, home / "whole", home / "place" / "damaged", seed)] += 1
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}") from error
    return found


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "place").mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("name", TARGETS)
def test_a_few(name: str, tmp_path: Path) -> None:
    assert survived(TARGETS[name], tmp_path, FEW).total() == FEW


@pytest.mark.campaign
@pytest.mark.parametrize("name", TARGETS)
def test_many(name: str, tmp_path: Path, record_property) -> None:  # type: ignore[no-untyped-def]
    count = int(os.environ.get("MUTATIONS", "700"))
    found = survived(TARGETS[name], tmp_path, count)
    print(f"\n| {name} | {count:,} | {found['read']:,} | {found['refused']:,} |")
    record_property("found", dict(found))
