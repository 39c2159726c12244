"""The report: order, text, files that load again, and figures that show what the rows hold."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.colors
import matplotlib.image
import pytest
import torch
import yaml
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fusionpl.errors import FusionError
from fusionpl.evaluation import matched, plots
from fusionpl.evaluation.barrier import Curve
from fusionpl.evaluation.matched import MatchedAxis
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import Row
from fusionpl.transport.maps import TransportMap

VANILLA = Curve((0, 0.5, 1), (0.98, 0.16, 0.97), (0.1, 4.0, 0.2))
ALIGNED = Curve((0, 0.5, 1), (0.98, 0.72, 0.7), (0.1, 0.9, 0.8))
CONFIG: dict[str, Any] = {"parents": ["runs/a", "runs/b"], "align": {"solver": "sinkhorn", "reg": 0.08}}


def a_report() -> Report:
    report = Report(config=dict(CONFIG), barrier={"vanilla": VANILLA, "aligned": ALIGNED})
    report.add(Row("parent seed-1", accuracy=0.975, loss=0.09, parameters=803210, flops=105_000_000, epochs=20))
    report.add(Row("ensemble", accuracy=0.99, loss=0.05, parameters=1606420))
    report.add(Row("fused", "finetuned", accuracy=0.9925, loss=0.03, epochs=4, seconds=18.04))
    report.add(Row("vanilla", accuracy=0.1625, loss=math.nan))
    report.add(Row("fused", accuracy=0.712, loss=0.93))
    return report


def drawn(plan: torch.Tensor) -> MatchedAxis:
    return MatchedAxis.of(TransportMap(plan, "sinkhorn", cost=0.25), drawn=True)


def bars(figure: Figure) -> list[Rectangle]:
    return [
        patch
        for container in figure.axes[0].containers
        if isinstance(container, BarContainer)
        for patch in container.patches
    ]


def labels(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_a_row_of_the_same_name_and_stage_is_replaced_where_it_stands() -> None:
    report = a_report()
    report.add(Row("ensemble", accuracy=0.5))
    report.add(Row("fused", accuracy=0.8))
    assert [(row.name, row.accuracy) for row in report.rows] == [
        ("parent seed-1", 0.975),
        ("ensemble", 0.5),
        ("fused", 0.9925),
        ("vanilla", 0.1625),
        ("fused", 0.8),
    ]


def test_table_is_aligned_and_puts_finetuned_rows_last() -> None:
    assert a_report().table().splitlines() == [
        "name           stage      accuracy    loss  parameters       FLOPs  epochs  seconds",
        "-------------  ---------  --------  ------  ----------  ----------  ------  -------",
        "parent seed-1  one-shot    97.50 %  0.0900       803 k  105 M (1×)      20        -",
        "ensemble       one-shot    99.00 %  0.0500      1.61 M           -       -        -",
        "vanilla        one-shot    16.25 %       -           -           -       -        -",
        "fused          one-shot    71.20 %  0.9300           -           -       -        -",
        "fused          finetuned   99.25 %  0.0300           -           -       4     18.0",
        "",
        "FLOPs: for one sample, in brackets how many times the best parent's.",
        "Seconds: wall time behind the parents' training.",
        "",
        "loss barrier: vanilla 3.8500, aligned 0.4500",
    ]


def test_rows_as_table_holds_raw_values_of_the_columns_in_use() -> None:
    report = Report([Row("fused", "finetuned", perplexity=12.5), Row("fused", perplexity=90000.0)])
    columns, data = report.rows_as_table()
    assert columns == ["name", "stage", "perplexity"]
    assert data == [["fused", "one-shot", 90000.0], ["fused", "finetuned", 12.5]]
    assert "90 k" in report.table()


def test_a_saved_report_loads_again_and_its_json_has_the_agreed_shape(tmp_path: Path) -> None:
    report = a_report()
    report.save(tmp_path / "report")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads((tmp_path / "report" / "report.json").read_text(), parse_constant=refuse)
    assert list(data) == ["rows", "config", "barrier"]
    assert data["rows"][1] == {
        "name": "ensemble",
        "stage": "one-shot",
        "accuracy": 0.99,
        "loss": 0.05,
        "parameters": 1606420,
    }
    assert data["config"] == CONFIG
    assert data["barrier"]["vanilla"]["barrier"] == pytest.approx(3.85)
    loaded = Report.load(tmp_path / "report")
    assert loaded.barrier == report.barrier
    assert loaded.config == report.config
    assert loaded.table() == report.table()


def test_a_curve_that_broke_is_saved_as_null(tmp_path: Path) -> None:
    Report(barrier={"vanilla": Curve((0, 0.5, 1), (1, 0, 1), (1, math.nan, 2))}).save(tmp_path / "report")
    assert json.loads((tmp_path / "report" / "report.json").read_text())["barrier"]["vanilla"]["barrier"] is None
    assert math.isnan(Report.load(tmp_path / "report").barrier["vanilla"].barrier)


def test_markdown_embeds_the_pictures_next_to_it_and_the_configuration(tmp_path: Path) -> None:
    report = a_report()
    report.config["output"] = Path("runs/fused")
    report.axes = {"blocks.0.ffn": drawn(torch.eye(4))}
    report.save(tmp_path)
    text = (tmp_path / "report.md").read_text()
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["bars.png", "interpolation.png", "transport-maps.png"]
    assert all(f"]({name})" in text for name in pictures)
    assert "| fused | finetuned | 99.25 % |" in text
    assert "All is as in the preset." in text.partition("<details>")[0]
    assert yaml.safe_load(text.split("```yaml")[1].split("```")[0]) == CONFIG | {"output": "runs/fused"}


def test_a_loaded_report_draws_all_again(tmp_path: Path) -> None:
    report = a_report()
    report.axes = {
        "stream": drawn(torch.rand(5, 4)),
        "ffn": MatchedAxis.of(TransportMap(torch.eye(3), "emd"), drawn=False),
    }
    report.blocks = {"deep": (torch.rand(3, 4), [0, 1, 3])}
    report.save(tmp_path / "first")
    Report.load(tmp_path / "first").save(tmp_path / "second")
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("first", "second")
    )
    assert {"report.html", "transport-maps.png", "blocks.png"} <= set(first)
    assert [name for name in first if first[name] != second.get(name)] == []


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        a_report().save(tmp_path / folder)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_save_that_fails_leaves_the_old_report_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_report().save(tmp_path / "report")
    before = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}

    def interrupted(curves: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plots, "curves", interrupted)
    changed = a_report()
    changed.add(Row("fused", accuracy=0.1))
    with pytest.raises(KeyboardInterrupt):
        changed.save(tmp_path / "report")
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": []}', '{"rows": [{"nome": 1}], "config": {}, "barrier": {}}'])
def test_a_file_that_is_no_report_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(FusionError, match=r"no report at '.*report.json'; fuse.py writes one"):
        Report.load(tmp_path)
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(FusionError, match=r"report.json' is not a fusion report .*run fuse.py again"):
        Report.load(tmp_path)


def test_bars_have_one_colour_a_kind_and_hatching_after_finetuning() -> None:
    figure = plots.figure(plots.bars(a_report().rows))
    assert labels(figure) == ["parent seed-1", "ensemble", "vanilla", "fused", "fused"]
    drawn = bars(figure)
    assert [patch.get_width() for patch in drawn] == pytest.approx([97.5, 99, 16.25, 71.2, 99.25])
    expected = [plots.GREY, plots.BLACK, plots.RED, plots.BLUE, plots.BLUE]
    assert [matplotlib.colors.to_hex(patch.get_facecolor()) for patch in drawn] == expected
    assert [bool(patch.get_hatch()) for patch in drawn] == [False, False, False, False, True]
    assert {"16.25 %", "99.25 %", "before finetuning", "after finetuning", "best parent"} <= set(texts(figure))


def test_bars_of_many_rows_stay_readable(tmp_path: Path) -> None:
    rows = [Row(f"parent seed-{seed}", accuracy=0.9) for seed in range(9)]
    rows += [Row(f"fused {seed}", "finetuned", accuracy=0.95) for seed in range(9)]
    figure = plots.figure(plots.bars(rows))
    figure.savefig(tmp_path / "bars.png", dpi=80)
    edges = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert all(lower.y1 <= upper.y0 for upper, lower in pairwise(edges))
    picture = matplotlib.image.imread(tmp_path / "bars.png")
    assert picture.shape[0] > picture.shape[1] * 0.8


def test_language_models_show_perplexity_on_a_scale_that_fits() -> None:
    rows = [Row("parent a", perplexity=9.0), Row("vanilla", perplexity=3e4), Row("fused", accuracy=0.4)]
    figure = plots.figure(plots.bars(rows))
    assert figure.axes[0].get_xlabel() == "perplexity"
    assert figure.axes[0].get_xscale() == "log"
    assert labels(figure) == ["parent a", "vanilla"]
    assert plots.figure(plots.bars([Row("vanilla", loss=1.0)])).axes[0].get_xlabel() == "loss (nats)"
    assert bars(plots.figure(plots.bars([Row("vanilla", loss=math.nan)]))) == []


def test_interpolation_marks_each_barrier() -> None:
    straight = Curve((0, 0.5, 1), (1, 1, 1), (1, 1, 1))
    shown = texts(plots.figure(plots.curves({"vanilla": VANILLA, "aligned": ALIGNED})))
    assert shown == ["drop 81.5 points", "drop 12.0 points", "barrier 3.85", "barrier 0.45"]
    assert texts(plots.figure(plots.curves({"aligned": straight}))) == []


@pytest.mark.parametrize(("n_parent", "n_anchor"), [(12, 12), (12, 6), (6, 12)])
def test_a_hard_matching_shows_as_a_diagonal(n_parent: int, n_anchor: int) -> None:
    torch.manual_seed(0)
    wide, narrow = max(n_parent, n_anchor), min(n_parent, n_anchor)
    staircase = torch.eye(narrow).repeat_interleave(wide // narrow, 0)
    plan = staircase if n_parent >= n_anchor else staircase.T
    shuffled = plan[torch.randperm(n_parent)][:, torch.randperm(n_anchor)] / wide
    figure = plots.figure(plots.maps({"blocks.0.ffn": drawn(shuffled)}))
    picture = torch.tensor(figure.axes[0].images[0].get_array())
    assert torch.equal(picture > 0, plan > 0)
    partners = max(1, n_parent // n_anchor)
    assert figure.axes[0].get_title() == (f"blocks.0.ffn\n{n_parent} → {n_anchor} units, {partners:.1f} partners each")


def test_heat_maps_are_few_small_and_finite() -> None:
    maps = {f"blocks.{index}.ffn": drawn(torch.eye(4)) for index in range(14)}
    titles = [axes.get_title().split("\n")[0] for axes in plots.figure(plots.maps(maps)).axes if axes.images]
    assert len(titles) == plots.MOST_MAPS
    assert titles[0] == "blocks.0.ffn"
    assert titles[-1] == "blocks.13.ffn"

    four = plots.figure(plots.maps(dict(list(maps.items())[:4]))).axes
    assert [axes.get_visible() for axes in four[:6]] == [True] * 4 + [False] * 2

    large = plots.figure(plots.maps({"ffn": drawn(torch.eye(600)[torch.randperm(600)])}))
    pooled = torch.tensor(large.axes[0].images[0].get_array())
    assert max(pooled.shape) == matched.MOST_CELLS
    assert bool((pooled.amax(0) == 1).all())

    rotation = torch.linalg.qr(torch.randn(8, 8))[0]
    dead = torch.eye(8) * (torch.arange(8) > 0)  # an anchor unit that nothing was sent to
    for plan in (rotation, dead):
        shown = torch.tensor(plots.figure(plots.maps({"stream": drawn(plan)})).axes[0].images[0].get_array())
        assert bool(torch.isfinite(shown).all())
        assert shown.min() >= 0
        assert shown.max() <= 1 + 1e-6
