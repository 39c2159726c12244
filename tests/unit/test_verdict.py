"""The verdict: paired differences against scipy and resampling, planted differences, and its words."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fusionpl.errors import FusionError
from fusionpl.evaluation.metrics import evaluate_samples
from fusionpl.evaluation.outcomes import Difference, Outcomes, scored
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import Row, best_parent

SAMPLES = 400


def of_classes(right: Tensor, loss: Tensor | None = None) -> Outcomes:
    loss = torch.rand(len(right)) if loss is None else loss
    return Outcomes(torch.stack([loss, torch.ones(len(right)), right.float()], 1))


def planted(only_ours: int, only_theirs: int, both: int = 300) -> tuple[Outcomes, Outcomes]:
    """Two classifiers of SAMPLES images, by how many one of them alone has right."""
    index = torch.arange(SAMPLES)
    ours = (index < both) | ((index >= both) & (index < both + only_ours))
    theirs = (index < both) | ((index >= both + only_ours) & (index < both + only_ours + only_theirs))
    return of_classes(ours), of_classes(theirs)


def a_report(ours: Outcomes, theirs: Outcomes, ensemble: float = 0.9, **more: Any) -> Report:
    report = Report()
    report.add(Row("parent a", **theirs.figures, **more), theirs)
    report.add(Row("parent b", accuracy=0.1, loss=9.0), theirs)
    report.add(Row("ensemble", accuracy=ensemble, loss=0.1))
    report.add(Row("fused", **ours.figures, **more), ours)
    return report


@pytest.mark.parametrize(("only_ours", "only_theirs"), [(20, 6), (6, 20), (1, 0), (9, 9), (0, 12)])
def test_accuracies_are_compared_as_mcnemar_does(only_ours: int, only_theirs: int) -> None:
    ours, theirs = planted(only_ours, only_theirs)
    found = ours.better(theirs, "accuracy")
    b, c, n = only_ours, only_theirs, SAMPLES
    assert found.value == pytest.approx((b - c) / n)
    by_hand = math.sqrt(b + c - (b - c) ** 2 / n) / n
    assert found.error == pytest.approx(by_hand * math.sqrt(n / (n - 1)))
    exact = stats.binomtest(b, b + c).pvalue
    mid_p = exact - stats.binom.pmf(min(b, c), b + c, 0.5)
    assert found.chance == pytest.approx(1.0 if b == c else mid_p)


def test_losses_are_compared_as_paired_samples() -> None:
    torch.manual_seed(0)
    theirs = torch.rand(SAMPLES)
    ours = theirs + 0.02 * torch.randn(SAMPLES) - 0.003
    right = torch.ones(SAMPLES)
    found = of_classes(right, ours).better(of_classes(right, theirs), "loss")
    expected = stats.ttest_rel(theirs.double(), ours.double())
    assert found.value == pytest.approx(float((theirs.double() - ours.double()).mean()))
    assert found.error == pytest.approx(stats.sem(theirs.double() - ours.double()))
    assert found.chance == pytest.approx(expected.pvalue)


def blocks(seed: int, better: float = 0.0) -> tuple[Outcomes, Outcomes]:
    """Two language models on blocks of 5 to 20 scored tokens, whose losses have much in common in a block."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(5, 21, (SAMPLES,), generator=generator).float()
    common, own = torch.randn(2, SAMPLES, generator=generator)
    theirs = count * (3 + common)
    ours = theirs - count * (better + 0.1 * own)
    return tuple(Outcomes(torch.stack([loss, count, torch.zeros(SAMPLES)], 1)) for loss in (ours, theirs))  # type: ignore[return-value]


def test_the_error_of_a_loss_over_tokens_is_that_of_resampled_blocks() -> None:
    ours, theirs = blocks(0, better=0.03)
    found = ours.better(theirs, "loss")
    assert found.value == pytest.approx(theirs.figures["loss"] - ours.figures["loss"], abs=1e-6)
    drawn = torch.randint(SAMPLES, (4000, SAMPLES), generator=torch.Generator().manual_seed(1))
    gains = (theirs.values - ours.values)[:, 0].double()
    resampled = gains[drawn].sum(1) / ours.values[:, 1].double()[drawn].sum(1)
    assert found.error == pytest.approx(float(resampled.std()), rel=0.05)


def test_equal_language_models_are_told_apart_one_time_in_twenty() -> None:
    chances = [ours.better(theirs, "loss").chance for ours, theirs in map(blocks, range(400))]
    assert 0.02 < sum(chance < 0.05 for chance in chances) / 400 < 0.08


def test_the_model_itself_is_not_to_be_told_apart() -> None:
    same, _ = planted(10, 0)
    (verdict,) = a_report(same, same).verdicts
    assert (verdict.difference.value, verdict.difference.error, verdict.difference.chance) == (0, 0, 1)
    assert verdict.words == "fused: not to be told apart from the best parent (0.0 ± 0.0 points): keep that one"
    assert verdict.share == 0


@pytest.mark.parametrize(
    ("only_ours", "only_theirs", "words"),
    [
        (20, 6, "fused: 3.5 ± 1.3 points above the best parent"),
        (6, 20, "fused: 3.5 ± 1.3 points below the best parent: keep that one"),
        (6, 8, "fused: not to be told apart from the best parent (−0.5 ± 0.9 points): keep that one"),
        (8, 6, "fused: not to be told apart from the best parent (+0.5 ± 0.9 points): keep that one"),
    ],
)
def test_a_planted_difference_in_words(only_ours: int, only_theirs: int, words: str) -> None:
    (verdict,) = a_report(*planted(only_ours, only_theirs)).verdicts
    assert verdict.words == words


def test_beside_all_parents_where_these_know_different_things() -> None:
    """Running all of them is the other way to have what they know."""
    (verdict,) = a_report(*planted(6, 8)).verdicts
    clear, level = (Difference(0.22, 0.02, chance, SAMPLES) for chance in (0.0, 0.5))
    words = replace(verdict, beside_all=clear).words
    assert words == (
        "fused: 22.0 ± 2.0 points above running all parents; not to be told apart from the best parent (−0.5 ± 0.9 "
        "points): keep that one"
    )
    below = replace(verdict, beside_all=Difference(-0.22, 0.02, 0.0, SAMPLES)).words
    assert below.startswith("fused: 22.0 ± 2.0 points below running all parents; ")
    assert replace(verdict, beside_all=level).words == verdict.words
    assert replace(verdict, beside_all=clear).as_dict()["difference_to_all"] == 0.22
    assert "difference_to_all" not in verdict.as_dict()


def test_a_planted_loss_in_words() -> None:
    ours, theirs = blocks(0, better=0.03)
    (verdict,) = a_report(ours, theirs, perplexity=20.0).verdicts
    assert verdict.words.endswith(" nats better than the best parent")
    (verdict,) = a_report(theirs, ours, perplexity=20.0).verdicts
    assert verdict.words.endswith(" nats worse than the best parent: keep that one")


def test_a_regression_is_judged_by_its_squared_error() -> None:
    torch.manual_seed(0)
    wanted = torch.rand(50)
    near, far = (Outcomes(scored((wanted + shift)[:, None], wanted)) for shift in (0.1, 0.3))
    report = Report()
    for name, outcomes in (("parent a", far), ("fused", near)):
        report.add(Row(name, pearson=0.9, **outcomes.figures), outcomes)
    (verdict,) = report.verdicts
    assert verdict.words == "fused: 0.0800 ± 0.0000 of squared error better than the best parent"
    assert verdict.as_dict()["share"] is None


def test_the_share_of_the_ensembles_gain() -> None:
    (verdict,) = a_report(*planted(20, 6), ensemble=0.765 + 0.07).verdicts
    assert verdict.share == pytest.approx(0.5)
    (verdict,) = a_report(*planted(20, 6), ensemble=0.765).verdicts
    assert verdict.share is None
    assert "share of the gain" not in a_report(*planted(20, 6), ensemble=0.765).table()
    shared = a_report(*planted(20, 6), ensemble=0.765 + 0.07)
    assert "fused: share of the gain 0.50, of the way from the best parent to the ensemble" in shared.table()
    apart = replace(shared.verdicts[0], beside_all=Difference(0.2, 0.02, 0.0, SAMPLES))
    assert apart.share_in_words == ""  # running all parents of different tasks is no ensemble to come near
    ours, theirs = blocks(0, better=0.03)
    (verdict,) = a_report(ours, theirs, perplexity=20.0).verdicts  # less loss is a gain
    assert 0 < (verdict.share or 0) < 0.1


def test_what_is_not_a_number_or_one_sample_is_no_reason_to_change() -> None:
    broken, fine = of_classes(torch.ones(4), torch.full((4,), math.nan)), of_classes(torch.ones(4))
    report = a_report(broken, fine, perplexity=3.0)
    assert report.verdicts[0].words == "fused: its loss is not a number: keep the best parent"
    assert report.verdicts[0].as_dict()["difference"] is None
    one = Outcomes(fine.values[:1])
    assert "one test sample" in a_report(one, one).verdicts[0].words


def test_models_of_other_samples_are_not_compared() -> None:
    with pytest.raises(FusionError, match="same test samples"):
        of_classes(torch.ones(4)).better(of_classes(torch.ones(5)), "accuracy")


def test_the_best_parent_is_chosen_by_validation_and_only_else_by_test() -> None:
    rows = [Row("parent a", accuracy=0.9, validation=0.7), Row("parent b", accuracy=0.8, validation=0.75)]
    assert best_parent(rows) == (rows[1], "validation")
    assert best_parent([*rows, Row("parent c", accuracy=0.85, validation=0.75)])[0].name == "parent c"  # type: ignore[index]
    assert best_parent([Row("parent a", accuracy=0.9), rows[1]]) == (Row("parent a", accuracy=0.9), "test")
    losses = [Row("parent a", accuracy=0.9, perplexity=9.0, loss=2.2, validation=2.1),
              Row("parent b", accuracy=0.8, perplexity=8.0, loss=2.1, validation=2.0)]  # fmt: skip
    assert best_parent(losses) == (losses[1], "validation")
    assert best_parent([Row("fused", accuracy=0.9)]) is None


def test_the_finetuned_model_is_judged_beside_the_finetuned_parent(tmp_path: Path) -> None:
    report = a_report(*planted(6, 20))
    ours, theirs = planted(20, 6)
    report.add(Row("parent a", "finetuned", **theirs.figures), theirs)
    report.add(Row("fused", "finetuned", **ours.figures), ours)
    report.save(tmp_path)
    loaded = Report.load(tmp_path)
    assert loaded.verdicts == report.verdicts
    last = "fused, finetuned: 3.5 ± 1.3 points above the best parent finetuned alike"
    assert last in loaded.table().splitlines()
    assert f"**{last}**" in (tmp_path / "report.md").read_text()
    written = (tmp_path / "report.md").read_text()
    assert "| parent a | one-shot | itself | 80.00 % |" in written
    assert "| parent a | finetuned | itself | 76.50 % |" in written
    assert "| fused | one-shot | worse, −3.5 ± 1.3 points | 76.50 % |" in written
    assert "| fused | finetuned | better, +3.5 ± 1.3 points | 80.00 % |" in written
    report.add(Row("parent a", "finetuned", accuracy=0.5))  # of which nobody knows what it did on each sample
    assert [one.stage for one in report.verdicts] == ["one-shot"]


def test_one_table_shows_what_each_needed_and_how_it_compares() -> None:
    ours, theirs = planted(20, 6)
    report = a_report(ours, theirs)
    assert "needs" not in report.table()
    assert "distilled" not in report.table()
    report.add(Row("distilled", accuracy=0.8, seconds=3.1, steps=22, needs="unlabelled data"), ours)
    report.add(Row("trained-on", accuracy=0.8, seconds=3.0, steps=30, needs="labels"), theirs)
    report.add(Row("fused", seconds=3.0, needs="unlabelled data", **ours.figures), ours)
    shown = report.markdown()
    assert "| distilled | better, +3.5 ± 1.3 points | 80.00 % | - | 3.1 | 22 | unlabelled data |" in shown
    assert "| trained-on | level, 0.0 ± 0.0 points | 80.00 % | - | 3.0 | 30 | labels |" in shown
    assert shown.count("| name |") == 1
    assert "had the seconds of the fused model" in shown


def test_samples_keep_what_evaluation_measures() -> None:
    torch.manual_seed(0)
    model = nn.Embedding(7, 7)  # input ids [B, T] -> scores [B, T, 7]
    ids, labels = torch.randint(7, (6, 4)), torch.randint(7, (6, 4))
    labels[torch.rand(6, 4) < 0.5] = -100
    batches = [{"input_ids": ids[:4], "labels": labels[:4]}, {"input_ids": ids[4:], "labels": labels[4:]}]
    figures, outcomes = evaluate_samples([model], batches)
    assert outcomes.values.shape == (6, 3)
    for row, scores, wanted in zip(outcomes.values, model(ids), labels, strict=True):
        assert row[0] == pytest.approx(cross_entropy(scores, wanted, reduction="sum").item(), abs=1e-5)
        assert row[1] == (wanted != -100).sum()
        assert row[2] == (scores.argmax(-1) == wanted).sum()
    assert figures["loss"] == outcomes.figures["loss"]
