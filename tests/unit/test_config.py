import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from lightning import Trainer

import fusionpl
from fusionpl.alignment.config import AlignConfig
from fusionpl.cli import finetune, fuse, train
from fusionpl.cli.parsing import parse, with_presets
from fusionpl.cli.tasks import task_of
from fusionpl.errors import FusionError
from fusionpl.fusion.config import FuseConfig, RefitConfig
from fusionpl.training.config import TrainerConfig

CONF = Path(__file__).parents[2] / "conf"
PARSERS = {"train": train.build_parser, "fuse": fuse.build_parser, "finetune": finetune.build_parser}


PRESETS = [path for kind in PARSERS for path in sorted((CONF / kind).glob("*.yaml"))]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_preset_parses(path: Path) -> None:
    words = ["--config", str(path)]
    options = parse(PARSERS[path.parent.name](task_of(words)), words, path)
    for key, value in yaml.safe_load(path.read_text()).items():
        assert key in options
        if not isinstance(value, dict):
            assert options[key] == value


@pytest.mark.parametrize("path", sorted((CONF / "fuse").glob("*.yaml")), ids=lambda path: path.stem)
def test_load_config_reads_the_presets(path: Path) -> None:
    config = fusionpl.load_config(path, {"calibration.samples": 7, "weights": [0.3, 0.7]})
    raw = yaml.safe_load(path.read_text())
    assert config.calibration.samples == 7
    assert config.weights == [0.3, 0.7]
    assert config.align.residual == raw.get("align", {"residual": AlignConfig.residual})["residual"]
    assert config.calibration.tokens == raw["calibration"]["tokens"]


def test_the_papers_preset_is_the_papers() -> None:
    config = fusionpl.load_config(CONF / "fuse/paper.yaml")
    assert (config.align.solver, config.align.reg, config.align.residual, config.align.qk) == (
        "sinkhorn",
        0.08,
        "average",
        "separate",
    )
    assert (config.anchor, config.calibration.samples, config.calibration.tokens) == (1, 200, "window:6")
    assert config.align.scaling == "source"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"align.solvr": "emd"}, "unknown key align.solvr; did you mean 'align.solver'?"),
        ({"align.solver": "magic"}, "align.solver: 'magic' is not sinkhorn or emd or assignment"),
        ({"anchor": "last"}, "anchor: 'last' is not int"),
        ({"align.embeddings": 1}, "align.embeddings: '1' is not bool"),
        ({"weights": ["a"]}, "weights"),
    ],
)
def test_a_wrong_override_names_the_key(overrides: dict, words: str) -> None:
    with pytest.raises(fusionpl.FusionError, match=words.replace("?", r"\?")):
        fusionpl.load_config(None, overrides)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(fusionpl.FusionError, match=r"nothing\.yaml"):
        fusionpl.load_config(tmp_path / "nothing.yaml")
    (tmp_path / "broken.yaml").write_text("align: [")
    with pytest.raises(fusionpl.FusionError, match=r"broken\.yaml is not YAML"):
        fusionpl.load_config(tmp_path / "broken.yaml")


def test_the_default_matches_units_as_the_preset_of_transport_does() -> None:
    default, transport = (fusionpl.load_config(CONF / "fuse" / f"{name}.yaml") for name in ("default", "transport"))
    assert (default.align, default.refit) == (transport.align, transport.refit)
    assert (default.strategy, transport.strategy) == ("auto", "transport")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("anchor: 0\nalign:\n", "'align' holds no options, which are align.evidence and such; leave it out"),
        ("anchor: 0\ncalibration: 5\n", "'calibration' holds no options"),
        ("anchor: 0\nalign: {reg: 1, reg: 2}\n", "'reg' is given twice, the second time in line 2"),
        ("- anchor\n", "holds a list, not settings"),
        ("hello\n", "holds a str, not settings"),
        ("# nothing\n", "holds no settings"),
        ("logger: csv\n", r"'logger' takes a list; write `logger: \[csv\]`"),
    ],
)
def test_a_file_that_holds_no_settings(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(FusionError, match=words):
        fuse.run(["--config", str(file), "--parents", "a", "b"])
    if "nothing" not in text and "logger" not in text:
        with pytest.raises(FusionError, match=words):
            fusionpl.load_config(file)


def test_presets_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert fusionpl.load_config("paper") == fusionpl.load_config(CONF / "fuse/paper.yaml")
    with pytest.raises(FusionError, match="there is no preset 'papr'; did you mean 'paper'"):
        fusionpl.load_config("papr")
    assert with_presets(["--config", "joint", "--seed", "1"], "fuse")[1] == str(CONF / "fuse/joint.yaml")
    assert with_presets(["--config=joint"], "fuse") == [f"--config={CONF / 'fuse/joint.yaml'}"]
    with pytest.raises(SystemExit):
        with_presets(["--list-presets"], "train")
    assert re.search(r"^vit-digits +A ViT on", capsys.readouterr().out, flags=re.MULTILINE)


def test_a_word_that_is_no_choice_is_refused_in_the_library_too() -> None:
    with pytest.raises(
        FusionError, match=r"align\.heads is one of flat, matched, not 'match'; did you mean 'matched'\?"
    ):
        AlignConfig(heads="match")  # type: ignore[arg-type]
    with pytest.raises(FusionError, match=r"strategy is one of transport, joint, head, auto, not 'average'"):
        FuseConfig(strategy="average")  # type: ignore[arg-type]
    with pytest.raises(FusionError, match=r"refit\.method is one of"):
        RefitConfig(method="rigde")  # type: ignore[arg-type]


LEFT_OUT = {  # what this project decides itself
    "barebones", "callbacks", "default_root_dir", "enable_checkpointing", "logger", "model_registry", "plugins",
    "reload_dataloaders_every_n_epochs", "use_distributed_sampler",
}  # fmt: skip


def test_options_of_the_trainer_are_lightnings() -> None:
    arguments = dict(inspect.signature(Trainer).parameters)
    options = {option.name: option.default for option in fields(TrainerConfig)}
    assert options == {name: one.default for name, one in arguments.items() if name not in LEFT_OUT}
