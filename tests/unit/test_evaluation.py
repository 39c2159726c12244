"""Metrics against one-pass oracles, cost against a hand count, the barrier against convexity."""

import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss

from fusionpl.errors import FusionError
from fusionpl.evaluation.barrier import Curve, interpolation
from fusionpl.evaluation.cost import flops, parameters
from fusionpl.evaluation.metrics import evaluate, evaluate_ensemble

CLASSES = 5
Batch = dict[str, Tensor]


def tiny_vit(seed: int, width: int = 16, drop: float = 0.0) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=8,
        patch_size=4,
        in_chans=1,
        num_classes=CLASSES,
        embed_dim=width,
        depth=1,
        num_heads=2,
        drop_rate=drop,
    )


def batches_of(sizes: list[int], seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(sum(sizes), 1, 8, 8, generator=generator)
    labels = torch.randint(CLASSES, (sum(sizes),), generator=generator)
    pairs = zip(images.split(sizes), labels.split(sizes), strict=True)
    return [{"pixel_values": x, "labels": y} for x, y in pairs]


@pytest.mark.parametrize("sizes", [[23], [8, 8, 7], [1, 22], [4] * 5 + [3]])
def test_metrics_do_not_depend_on_how_batches_are_split(sizes: list[int]) -> None:
    model = tiny_vit(1).eval()
    (whole,) = batches_of([23])
    with torch.no_grad():
        scores = model(whole["pixel_values"])
    measured = evaluate(model, batches_of(sizes))
    assert set(measured) == {"accuracy", "loss"}
    assert measured["loss"] == pytest.approx(cross_entropy(scores, whole["labels"]).item(), rel=1e-5)
    assert measured["accuracy"] == pytest.approx((scores.argmax(1) == whole["labels"]).float().mean().item())


def test_dropout_is_off_and_every_module_keeps_its_mode() -> None:
    model = tiny_vit(1, drop=0.5).train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    assert evaluate(model, batches_of([8])) == evaluate(model, batches_of([8]))
    flops(model, batches_of([2])[0])
    with pytest.raises(FusionError):
        evaluate(model, [])
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("read", ["item", "__bool__"])
def test_no_batch_waits_for_the_device(monkeypatch: pytest.MonkeyPatch, read: str) -> None:
    model, original, calls = tiny_vit(1), getattr(Tensor, read), []

    def counted(self: Tensor) -> bool | float:
        calls.append(self)
        result: bool | float = original(self)
        return result

    monkeypatch.setattr(Tensor, read, counted)
    evaluate(model, batches_of([4]))
    once = len(calls)
    evaluate(model, batches_of([1] * 12))
    assert len(calls) == 2 * once


def test_tokens_are_scored_where_they_are_labelled() -> None:
    torch.manual_seed(0)
    model = nn.Embedding(7, 7)  # input ids [B, T] -> scores [B, T, 7]
    ids, labels = torch.randint(7, (6, 4)), torch.randint(7, (6, 4))
    labels[torch.rand(6, 4) < 0.5] = -100
    labels[0] = -100  # a batch without a single scored token
    batches = [{"input_ids": ids[:1], "labels": labels[:1]}, {"input_ids": ids[1:], "labels": labels[1:]}]
    scored = labels != -100
    scores = model(ids)[scored]
    measured = evaluate(model, batches)
    assert measured["loss"] == pytest.approx(cross_entropy(scores, labels[scored]).item(), rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(measured["loss"]))
    assert measured["accuracy"] == pytest.approx((scores.argmax(-1) == labels[scored]).float().mean().item())


def test_a_broken_model_shows_as_nan_loss() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
    model.load_state_dict({"1.weight": torch.full((CLASSES, 64), math.nan), "1.bias": torch.zeros(CLASSES)})
    assert math.isnan(evaluate(model, batches_of([4, 4]))["loss"])


def test_evaluation_needs_labelled_batches() -> None:
    with pytest.raises(FusionError, match="there are no batches"):
        evaluate(tiny_vit(1), [])
    with pytest.raises(FusionError, match=r"no 'labels', only \['pixel_values'\]"):
        evaluate(tiny_vit(1), [{"pixel_values": torch.zeros(1, 1, 8, 8)}])


def test_ensemble_averages_probabilities_of_parents_of_any_width() -> None:
    models = [tiny_vit(1).eval(), tiny_vit(2).eval(), tiny_vit(3, width=32).eval()]
    (whole,) = batches_of([20])
    with torch.no_grad():
        mean = torch.stack([model(whole["pixel_values"]).softmax(1) for model in models]).mean(0)
    measured = evaluate_ensemble(models, batches_of([12, 8]))
    assert measured["loss"] == pytest.approx(nll_loss(mean.log(), whole["labels"]).item(), rel=1e-5)
    assert measured["accuracy"] == pytest.approx((mean.argmax(1) == whole["labels"]).float().mean().item())
    twice = evaluate_ensemble([models[0]] * 2, batches_of([20]))
    assert twice == pytest.approx(evaluate(models[0], batches_of([20])))


def test_flops_of_one_sample_match_a_count_by_hand() -> None:
    d, tokens, patches = 16, 5, 4
    patch = 2 * patches * 16 * d
    attention = 2 * tokens * d * 3 * d + 2 * 2 * tokens * tokens * d + 2 * tokens * d * d
    mlp = 2 * 2 * tokens * d * 4 * d
    by_hand = patch + attention + mlp + 2 * d * CLASSES
    batch = batches_of([3])[0]
    assert flops(tiny_vit(1), batch) == by_hand
    assert flops(tiny_vit(1), batch["pixel_values"]) == by_hand


def test_a_tied_parameter_counts_once() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    assert parameters(nn.Sequential(first, second)) == 16 + 4 + 4


def test_interpolation_runs_from_b_to_a_through_the_average() -> None:
    a, b, template = tiny_vit(1), tiny_vit(2), tiny_vit(3)
    before = {name: tensor.clone() for name, tensor in template.state_dict().items()}
    batches = batches_of([16, 16])
    curve = interpolation(template, a.state_dict(), b.state_dict(), batches, points=3)
    middle = tiny_vit(3)
    middle.load_state_dict({name: (t + b.state_dict()[name]) / 2 for name, t in a.state_dict().items()})
    assert curve.lambdas == (0, 0.5, 1)
    assert curve.loss == pytest.approx([evaluate(model, batches)["loss"] for model in (b, middle, a)])
    assert curve.accuracy == pytest.approx([evaluate(model, batches)["accuracy"] for model in (b, middle, a)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in template.state_dict().items())


def test_a_linear_classifier_has_no_barrier_because_its_loss_is_convex() -> None:
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)) for _ in range(2))
    curve = interpolation(a, a.state_dict(), b.state_dict(), batches_of([64]))
    assert len(curve.lambdas) == 11
    assert curve.barrier == pytest.approx(0, abs=1e-6)
    assert min(curve.loss_excess) < -1e-3


def test_a_permuted_copy_has_a_barrier_and_an_aligned_one_has_none() -> None:
    torch.manual_seed(0)
    a = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    batches = batches_of([64])
    optimiser = torch.optim.Adam(a.parameters(), lr=0.01)
    for _ in range(60):
        optimiser.zero_grad()
        cross_entropy(a(batches[0]["pixel_values"]), batches[0]["labels"]).backward()
        optimiser.step()
    order = torch.randperm(32)
    state = a.state_dict()
    permuted = {"1.weight": state["1.weight"][order], "1.bias": state["1.bias"][order]}
    permuted |= {"3.weight": state["3.weight"][:, order], "3.bias": state["3.bias"]}
    assert interpolation(a, permuted, state, batches, points=5).barrier > 0.1
    assert interpolation(a, state, state, batches, points=5).barrier == pytest.approx(0, abs=1e-6)


def test_counters_survive_interpolation() -> None:
    models = [nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, CLASSES)) for _ in range(2)]
    curve = interpolation(models[0], models[0].state_dict(), models[1].state_dict(), batches_of([8]), points=2)
    assert all(math.isfinite(loss) for loss in curve.loss)


def test_barriers_are_measured_from_the_line_between_the_ends() -> None:
    curve = Curve((0, 0.25, 1), (0.8, 0.1, 0.4), (1.0, 4.0, 2.0))
    assert curve.barrier == pytest.approx(4 - (0.25 * 2 + 0.75 * 1))
    assert curve.accuracy_barrier == pytest.approx(0.25 * 0.4 + 0.75 * 0.8 - 0.1)
    assert Curve((0, 0.5, 1), (0, 0.5, 1), (3, 2, 1)).barrier == 0
    assert math.isnan(Curve((0, 0.5, 1), (1, 0, 1), (1, math.nan, 2)).barrier)


def test_models_that_do_not_fit_cannot_be_interpolated() -> None:
    small, wide = tiny_vit(1).state_dict(), tiny_vit(1, width=32).state_dict()
    with pytest.raises(FusionError, match=r"'cls_token' has shapes \(1, 1, 16\) and \(1, 1, 32\); align"):
        interpolation(tiny_vit(1), small, wide, batches_of([2]))
    headless = {name: tensor for name, tensor in small.items() if name != "head.bias"}
    with pytest.raises(FusionError, match=r"'head.bias' is in only one of the two models"):
        interpolation(tiny_vit(1), small, headless, batches_of([2]))
    with pytest.raises(ValueError, match="at least 2 points, not 1"):
        interpolation(tiny_vit(1), small, small, batches_of([2]), points=1)


def test_a_regression_is_measured_by_correlation_and_squared_error() -> None:
    class Line(nn.Module):
        def __init__(self, slope: float) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(slope))

        def forward(self, x: Tensor) -> Tensor:
            return (self.slope * x)[:, None]

    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    batches = [{"pixel_values": part, "labels": part**3} for part in x.split(2)]
    found = evaluate(Line(2.0), batches)
    wanted = torch.corrcoef(torch.stack([2 * x, x**3]))[0, 1]
    assert found["pearson"] == pytest.approx(float(wanted), abs=1e-6)
    assert found["spearman"] == pytest.approx(1.0, abs=1e-6)
    assert found["loss"] == pytest.approx(float((2 * x - x**3).square().mean()), rel=1e-6)
    both = evaluate_ensemble([Line(1.0), Line(3.0)], batches)
    assert both == pytest.approx(found, rel=1e-6)
