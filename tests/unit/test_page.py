"""The report's page: complete in itself, safe whatever a parent is called, and drawn by a browser without complaint."""

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from fusionpl.evaluation.barrier import Curve
from fusionpl.evaluation.matched import MatchedAxis
from fusionpl.evaluation.outcomes import Outcomes
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import Row
from fusionpl.transport.maps import TransportMap

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "</script><script>document.title='broken'</script>"
# Appended to the page: tells the page around it what the browser made of it, axes in the order of their cost.
PROBE = """<script>addEventListener("load", () => {
  document.getElementById("by-cost").checked = true;
  const all = (selector) => [...document.querySelectorAll(selector)];
  const top = (element) => element.getBoundingClientRect().top;
  parent.postMessage({
    title: document.title,
    drawn: all("svg").filter((svg) => svg.querySelector("path").getBoundingClientRect().width > 200).map(({id}) => id),
    axes: all(".axes td:first-child").sort((a, b) => top(a) - top(b)).map((cell) => cell.textContent),
    shown: innerWidth,
    needed: document.documentElement.scrollWidth,
  }, "*");
});</script>"""
AROUND = """<body><script>addEventListener("message", ({data}) => {
  document.body.append(Object.assign(document.createElement("pre"), {textContent: JSON.stringify(data)}));
})</script><iframe src="report.html" width="360"></iframe><iframe src="report.html" width="1280"></iframe>"""


def a_report() -> Report:
    report = Report(config={"parents": ["runs/a", EVIL]}, notes=[EVIL], prompt=EVIL, continuations={EVIL: EVIL})
    names = ["parent a", f"parent {EVIL}", "ensemble", "vanilla", "distilled", "fused"]
    for index, name in enumerate(names):
        right = (torch.arange(40) % 10 < 9 - index).float()
        outcomes = Outcomes(torch.stack([1 - right, torch.ones(40), right], 1))
        steps = 3 if name == "distilled" else None
        report.add(Row(name, **outcomes.figures, parameters=1000, flops=2000, seconds=1.0, steps=steps), outcomes)
    report.barrier = {EVIL: Curve((0, 0.5, 1), (0.9, 0.2, 0.9), (0.1, float("nan"), 0.1))}
    report.blocks = {EVIL: (torch.rand(3, 4), [0, 1, 3])}
    plans = {"q": ("sinkhorn", 0.1), "ffn": ("emd", 0.4), "out": ("identity", None), EVIL: ("assignment", 0.2)}
    report.axes = {
        name: MatchedAxis.of(TransportMap(torch.eye(6), solver, cost=cost), drawn=name in ("q", EVIL))
        for name, (solver, cost) in plans.items()
    }
    return report


class Tags(HTMLParser):
    """The tags that a browser sees, and the text outside of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is None:
            self.text += data


def test_the_page_has_all_sections_and_loads_nothing() -> None:
    report = a_report()
    seen = Tags(report.html())
    headings = ["Models", "What it costs", "Notes", "Loss barrier", "Blocks", "Transport maps", "Axes",
                "Continuations", "Words", "Configuration"]  # fmt: skip
    places = [seen.text.index(word) for word in (report.verdicts[0].words, *(f"{head}\n" for head in headings[:-1]))]
    assert places == sorted(places)
    assert "Configuration" in seen.text
    assert not [tag for tag, attributes in seen.tags if attributes.keys() & {"src", "href"}]
    assert EVIL in seen.text
    assert not {"script", "iframe"} & {tag for tag, _ in seen.tags}
    assert "ensemble, 70.00 %, 2 kFLOPs" in seen.text  # under the pointer
    assert f"{EVIL}, λ = 0.5, 20.00 %" in seen.text


def test_the_page_is_small_and_its_colours_are_those_of_a_light_or_dark_page() -> None:
    text = a_report().html()
    assert len(text) < 300_000
    drawn = re.findall("<svg.*?</svg>", text, re.DOTALL)
    assert len(drawn) == 6
    assert [colour for svg in drawn for colour in re.findall("(?:fill|stroke): *(#[0-9a-f]+)", svg)] == []


def test_a_page_without_figures_is_short() -> None:
    assert len(Report(config={"seed": 1}).html()) < 10_000


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, for example apt-get install chromium")
def test_a_browser_draws_it_on_a_phone_and_a_desktop(tmp_path: Path) -> None:
    policy = "default-src 'none'; "
    (tmp_path / "report.html").write_text(
        a_report().html().replace(policy, f"{policy}script-src 'unsafe-inline'; ") + PROBE
    )
    (tmp_path / "around.html").write_text(AROUND)
    words = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
             "--hide-scrollbars", "--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}",
             (tmp_path / "around.html").as_uri()]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    summary = [json.loads(unescape(line)) for line in re.findall("<pre>(.*?)</pre>", done.stdout)]
    assert (
        sorted(facts.pop("shown") for facts in summary)
        == sorted(facts.pop("needed") for facts in summary)
        == [360, 1280]
    )
    drawn = ["cost-0", "barrier-0", "barrier-1", "blocks-0", "maps-0", "maps-1"]
    assert summary == [{"title": "Fusion report", "drawn": drawn, "axes": ["ffn", EVIL, "q", "out"]}] * 2
