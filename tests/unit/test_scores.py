"""Main figures of tasks: the library's own values, and errors that repeated draws of samples show."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_f1_score
from torchmetrics.functional.regression import pearson_corrcoef

from fusionpl.evaluation.outcomes import Outcomes, scored
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import Row
from fusionpl.evaluation.scores import Scores

KINDS = ("classes", "tags", "numbers")


def drawn(kind: str, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """What two models put out, the second one better, and labels."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, count, 3, generator=generator)
    if kind == "classes":
        labels = torch.randint(3, (count,), generator=generator)
        sure = torch.nn.functional.one_hot(labels, 3).float()
        return noise[0] + sure, noise[1] + 2 * sure, labels
    if kind == "tags":
        labels = (noise[2] > 0.5).float()
        return noise[0] + noise[2], noise[1] + 2 * noise[2], labels
    labels = noise[2, :, 0] + 5
    return noise[0, :, :1] + labels[:, None], noise[1, :, :1] + 2 * labels[:, None], labels


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_torchmetrics(kind: str) -> None:
    output, _, labels = drawn(kind, 200, 1)
    expected = {
        "classes": lambda: (output.argmax(1) == labels).double().mean(),
        "tags": lambda: binary_f1_score((output > 0).flatten().int(), labels.flatten().int()),
        "numbers": lambda: pearson_corrcoef(output[:, 0].double(), labels.double()),
    }[kind]()
    found = Scores.of(output, labels)
    assert found.metric == {"classes": "accuracy", "tags": "f1", "numbers": "pearson"}[kind]
    assert found.figure == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_standard_errors_are_the_spread_over_draws(kind: str) -> None:
    pairs = [(Scores.of(one, labels), Scores.of(other, labels))
             for one, other, labels in (drawn(kind, 150, seed) for seed in range(300))]  # fmt: skip
    differences = [other.better(one) for one, other in pairs]
    ratios = [other.ratio(one) for one, other in pairs]
    for each in ([(one.value, one.error) for one in differences], ratios):
        values, errors = torch.tensor(each).T
        assert float(errors.mean()) == pytest.approx(float(values.std()), rel=0.15)


def blocks(count: int, seed: int) -> tuple[Scores, Scores]:
    """The perplexities of two models on blocks of some scored tokens, the second one better."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 15, (count,), generator=generator).double()
    losses = tokens * (2 + torch.rand(count, generator=generator).double())
    less = losses - tokens * torch.rand(count, generator=generator).double()
    one, two = (Scores.perplexity(Outcomes(torch.stack([own, tokens, tokens], 1))) for own in (losses, less))
    assert one.figure == pytest.approx(float((losses.sum() / tokens.sum()).exp()))
    return one, two


def test_perplexities_and_the_spread_over_draws() -> None:
    pairs = [blocks(150, seed) for seed in range(300)]
    assert all(two.better(one).value > 0 for one, two in pairs)  # less is better
    assert all(two.ratio(one)[0] == pytest.approx(one.figure / two.figure) for one, two in pairs)
    differences = [(found.value, found.error) for found in (two.better(one) for one, two in pairs)]
    for each in (differences, [two.ratio(one) for one, two in pairs]):
        values, errors = torch.tensor(each).T
        assert float(errors.mean()) == pytest.approx(float(values.std()), rel=0.15)


def test_the_accuracy_of_outcomes_and_what_has_no_figure() -> None:
    output, other, labels = drawn("tags", 40, 2)
    one, two = (Outcomes(scored(given, labels)) for given in (output, other))
    assert Scores.share(one).figure == pytest.approx(one.figures["accuracy"])
    expected = two.better(one, "accuracy")
    assert Scores.share(two).better(Scores.share(one)).error == pytest.approx(expected.error)
    assert Scores.of(torch.full((4, 2), -1.0), torch.zeros(4, 2)).figure == 0
    constant = Scores.of(torch.ones(4, 1), torch.arange(4.0))
    assert constant.figure != constant.figure  # not a number
    alone = Scores.of(torch.ones(1, 2), torch.zeros(1, dtype=torch.int64))
    assert alone.ratio(alone)[1] != alone.ratio(alone)[1]


def a_report(**figures: list[Scores]) -> Report:
    """Two parents, both run, a fitted trunk and a fused network, on one task of numbers and one of classes."""
    report = Report()
    for name, found in figures.items():
        tasks = {one.metric: one for one in found}
        metrics, values = {task: task for task in tasks}, {task: one.figure for task, one in tasks.items()}
        row = Row(name.replace("_", " "), tasks=values, metrics=metrics, flops=10)
        report.add(row, tasks=tasks)
    return report


def test_what_has_no_figure_is_said_and_read_again(tmp_path: Path) -> None:
    output, better, labels = drawn("classes", 100, 3)
    worse, good = Scores.of(output, labels), Scores.of(better, labels)
    constant = Scores.of(torch.ones(50, 1), torch.arange(50.0))
    numbers = Scores.of(torch.arange(50.0)[:, None], torch.arange(50.0).sin())
    report = a_report(
        parent_accuracy=[worse], parent_pearson=[numbers], all_parents=[worse, numbers], fused=[good, constant]
    )
    report.save(tmp_path)
    text = (tmp_path / "report.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    fused = next(row for row in found["rows"] if row["name"] == "fused")
    assert fused["tasks"] == {"accuracy": pytest.approx(good.figure)}
    assert [one["words"].partition(" against")[0] for one in found["verdict"]] == [
        "accuracy gained", "pearson not to be told apart",
    ]  # fmt: skip
    assert found["verdict"][1]["difference"] is None
    loaded = Report.load(tmp_path)
    assert loaded.tasks.keys() == report.tasks.keys()
    assert "not to be told apart: pearson (not a number)" in loaded.table()
    assert "at 50 % of their operations: gained: accuracy (" in loaded.table()
