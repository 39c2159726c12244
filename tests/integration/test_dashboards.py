"""What dashboards are told: Weights & Biases by its own offline mode or by a stand-in for wandb.init, TensorBoard."""

import uuid
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
import yaml

from fusionpl.cli import evaluate, finetune, fuse, fusing
from fusionpl.cli.outputs import in_sweep
from fusionpl.cli.parsing import parse
from fusionpl.cli.running import main
from fusionpl.errors import FusionError
from fusionpl.presets import CONF
from fusionpl.training.dashboard import log_models
from fusionpl.training.loggers import finish_loggers, make_loggers
from fusionpl.training.weights_and_biases import KEPT, dashboard_name, group_of, open_run
from tests.integration.runs import make_run

VARIABLES = ("API_KEY", "MODE", "PROJECT", "RUN_GROUP", "RUN_ID", "SWEEP_ID", "DIR", "NAME", "JOB_TYPE")


class Run:
    """A run of Weights & Biases that writes down what it is told."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given, self.id, self.group = given, given.get("id") or uuid.uuid4().hex, given.get("group")
        self.offline = given.get("mode") == "offline"
        self.settings, self.url = SimpleNamespace(_offline=False), f"https://wandb.ai/{self.id}"
        self.used: list[str] = []
        self.made: list[str] = []
        self.logged: dict[str, Any] = {}

    def log(self, figures: dict[str, Any]) -> None:
        self.logged |= figures

    def use_artifact(self, artifact: wandb.Artifact) -> None:
        self.used.append(artifact.name.partition(":")[0])

    def log_artifact(self, artifact: wandb.Artifact) -> None:
        self.made.append(artifact.name.partition(":")[0])

    def finish(self) -> None:
        pass


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("NETRC", "")
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that were opened online."""
    opened: list[Run] = []

    def init(**given: Any) -> Run:
        opened.append(Run(given))
        return opened[-1]

    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr(wandb, "init", init)
    return opened


def log_once(folder: Path, **more: Any) -> None:
    finish_loggers(make_loggers(["wandb"], folder, name="fuse fused", job="fuse", **more))


def test_lineage_group_and_report_of_a_fusion(tmp_path: Path, runs: list[Run]) -> None:
    parents = [str(make_run(tmp_path / f"seed-{seed}", seed)) for seed in range(2)]
    fused, tuned = tmp_path / "fused", tmp_path / "fused-finetuned"
    both = ["--trainer.accelerator", "cpu", "--logger", "wandb", "tensorboard"]
    assert main(fuse.run, ["--parents", *parents, "--report", "rows", "--output", str(fused), *both]) == 0
    assert main(finetune.run, ["--model", str(fused), "--trainer.max_epochs", "1", *both]) == 0
    assert main(evaluate.run, ["--models", str(fused), "--output", str(tmp_path / "out"), "--logger", "wandb"]) == 0
    fusion, first, parent, vanilla, report, evaluation = runs
    assert [run.given["job_type"] for run in runs] == ["fuse", *["finetune"] * 4, "evaluate"]
    assert {run.given["group"] for run in runs} == {dashboard_name(fused)}
    names = [Path(parent).name for parent in parents]  # published, without where they lie
    assert fusion.given["config"]["parents"] == first.given["config"]["origin"]["parents"] == names
    assert (fusion.used, fusion.made) == ([dashboard_name(one) for one in parents], [dashboard_name(fused)])
    assert (first.used, first.made) == ([dashboard_name(fused)], [dashboard_name(tuned)])
    assert parent.used in ([dashboard_name(parents[0])], [dashboard_name(parents[1])])
    assert (vanilla.used, vanilla.made) == (fusion.used, [dashboard_name(tuned / "baselines/vanilla")])
    assert (evaluation.used, evaluation.made) == ([dashboard_name(fused)], [])
    assert report.given["id"] == first.id  # the first candidate's run goes on
    assert {"report", "report/bars", "fused one-shot/accuracy"} <= fusion.logged.keys()
    assert {"report", "report/bars", "fused finetuned/accuracy"} <= report.logged.keys()
    for kind, logged in (("fuse", fusion.logged), ("finetune", first.logged)):
        assert yaml.safe_load((CONF / f"sweeps/{kind}.yaml").read_text())["metric"]["name"] in logged
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes a second to load

    board = EventAccumulator(str(tuned / "tensorboard")).Reload()
    assert {"train/loss", "val/accuracy", "fused finetuned/accuracy"} <= set(board.Tags()["scalars"])
    assert "report/bars" in board.Tags()["images"]
    assert "report/text_summary" in board.Tags()["tensors"]
    assert (tuned / "metrics.csv").read_text().count("\n") == 2 + 1  # the report keeps the epoch and the test


@pytest.mark.parametrize("kind", [pytest.param("fuse", marks=pytest.mark.slow), "finetune"])
def test_a_sweep_names_options_and_values_that_there_are(kind: str) -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args  # takes a second to load

    file = CONF / "sweeps" / f"{kind}.yaml"
    sweep = yaml.safe_load(file.read_text())
    commands = {"fuse": (fuse.build_parser, fusing.PRESET), "finetune": (finetune.build_parser, finetune.PRESET)}
    build, preset = commands[kind]
    _, _, program, args, *fixed = sweep["command"]
    assert (program, args, sweep["program"]) == ("${program}", "${args}", f"{kind}.py")
    listed = {key: one.get("values") or [one["min"], one["max"]] for key, one in sweep["parameters"].items()}
    for row in range(max(map(len, listed.values()))):
        chosen = {key: values[min(row, len(values) - 1)] for key, values in listed.items()}
        words = create_sweep_command_args({"args": {key: {"value": value} for key, value in chosen.items()}})["args"]
        options = parse(build(), [*words, *fixed], preset)
        assert {key: options[key] for key in chosen} == chosen


def test_what_the_environment_says_comes_first(
    tmp_path: Path, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = tmp_path / "fused"
    log_once(fused, group="mine")
    ours = {"project": "fusionpl", "group": "mine", "job_type": "fuse", "name": "fuse fused", "dir": str(tmp_path)}
    assert runs[0].given.items() >= ours.items()
    theirs = {"PROJECT": "team", "RUN_GROUP": "theirs", "JOB_TYPE": "try", "NAME": "a", "DIR": "/elsewhere"}
    for name, value in theirs.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    log_once(fused, group="mine")
    assert runs[1].given["project"] == "team"
    assert not any(runs[1].given.get(key) for key in ("group", "job_type", "name", "dir", "mode"))


def test_under_wandb_agent_the_sweep_says_which_run_it_is(
    tmp_path: Path, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert in_sweep(tmp_path / "fused") == tmp_path / "fused"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "q7")
    (tmp_path / KEPT).write_text("id: r1\ngroup: mine\n")
    log_once(tmp_path, group="mine", resume=True)
    assert not any(runs[0].given.get(key) for key in ("group", "name", "id"))
    assert in_sweep(tmp_path / "fused") == tmp_path / "fused-q7"


def test_a_resumed_run_is_the_same_run_offline_too(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    kept = []
    for resume in (False, True, False):
        log_once(folder, group="mine", resume=resume)
        kept.append(yaml.safe_load((folder / KEPT).read_text()))
    assert kept[0] == kept[1]
    assert kept[2]["id"] != kept[0]["id"]
    assert group_of([tmp_path, folder]) == "mine"
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{kept[0]['id']}*"))) == 2


def test_hub_ids_and_runs_that_are_offline_link_nothing(tmp_path: Path, runs: list[Run]) -> None:
    model = make_run(tmp_path / "a b", 0)
    loggers = make_loggers(["wandb"], tmp_path / "out", name="x", job="evaluate")
    log_models(loggers, used=["org/name@main", model, model / "model"])
    assert runs[0].used == [dashboard_name(model), dashboard_name(model / "model")]
    assert dashboard_name(model).startswith(f"{tmp_path.name}-a-b-")
    runs[0].offline = True
    log_models(loggers, used=[model], made=model)
    assert (len(runs[0].used), runs[0].made) == (2, [dashboard_name(model)])
    assert group_of(["org/name"]) is None


def test_what_weights_and_biases_refuses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: Any) -> None:
        raise wandb.Error("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    assert main(lambda _: log_once(tmp_path), []) == 2
    assert capsys.readouterr().err == (
        "error: Weights & Biases: No API key configured; keep the run offline with WANDB_MODE=offline, or "
        "leave it out with --logger csv\n"
    )


def test_a_command_that_fails_leaves_no_run_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: Sequence[str]) -> None:
        open_run(make_loggers(["wandb"], tmp_path / "fused", name="fuse fused", job="fuse"), tmp_path)
        assert wandb.run is not None
        raise FusionError("there is no such parent")

    assert main(fail, []) == 2
    assert "there is no such parent" in capsys.readouterr().err
    assert wandb.run is None


def test_none_stands_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(fuse.run, ["--parents", "a", "b", "--logger", "none", "wandb"]) == 2
    assert "--logger none wandb: none leaves the others out" in capsys.readouterr().err
