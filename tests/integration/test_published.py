"""What people bring: pairs of published layouts through every command, with nothing but --parents and --data.path."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from fusionpl import load_model
from fusionpl.cli import evaluate, finetune, fuse
from fusionpl.cli.running import main
from fusionpl.evaluation.report import Report
from tests import published
from tests.published import IMAGES, TEXTS, lines, make_pair

QUIET = ["--logger", "none", "--trainer.accelerator", "cpu"]
# Series whose parts other tests of commands or of families cover.
SLOW = (
    "gpt2",
    "pythia",
    "llama",
    "gemma3",
    "mistral",
    "phi3",
    "opt",
    "t5",
    "flan_t5",
    "modernbert",
    "xlm_roberta",
    "vit",
    "deit",
)
NO_TRAINING = ("sentence", "dinov2")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One file of plain text."""
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text("\n".join(lines(300)) + "\n")
    return str(file)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sixty colour images in folders by class."""
    home, noise = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number, name in enumerate(("cat", "dog")):
        (home / name).mkdir()
        for index in range(30):
            pixels = noise.random((32, 32, 3)) * 120 + number * 100
            Image.fromarray(pixels.astype("uint8")).save(home / name / f"{index}.png")
    return str(home)


def loaded(folder: Path) -> Any:
    """A model as its own library reads it."""
    (cls,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(transformers, cls).from_pretrained(folder)


@pytest.mark.parametrize(
    "series",
    [
        pytest.param(one, marks=[pytest.mark.slow] * (one.__name__ in SLOW), id=one.__name__)
        for one in (*TEXTS, *IMAGES)
    ],
)
def test_a_pair_goes_through_every_command(
    series: Callable[[Path], None], text: str, images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parents, data = make_pair(series, tmp_path), images if series in IMAGES else text
    output, pickles = tmp_path / "fused", ["--allow-pickle"] if series.__name__ == "multibert" else []
    common = ["--data.path", data, *pickles]
    assert main(fuse.run, ["--parents", *parents, *common, "--check", *QUIET]) == 0, capsys.readouterr().err
    assert main(fuse.run, ["--parents", *parents, *common, "--output", str(output), *QUIET]) == 0
    assert main(evaluate.run, ["--models", *parents, str(output), *common, "--logger", "none"]) == 0
    (first, *_), model = (
        (json.loads((Path(path) / "config.json").read_text()) for path in (parents[0], output / "model")),
        loaded(output / "model"),
    )
    assert model.config.to_dict().get("vocab_size") == first.get("vocab_size")
    assert type(model).__name__ == first["architectures"][0]
    kept, own = load_model(output).state_dict(), model.state_dict()
    assert all(torch.equal(kept[name], tensor.float()) for name, tensor in own.items() if tensor.is_floating_point())
    assert {"parent " + Path(parent).name for parent in parents} | {"ensemble", "fused"} <= {
        row.name for row in Report.load(output / "report").rows
    }
    if series.__name__ not in NO_TRAINING:
        argv = ["--model", str(output), "--baselines", "false", "--trainer.max_epochs", "1", *QUIET]
        assert main(finetune.run, argv) == 0, capsys.readouterr().err


def run(*argv: str) -> int:
    return main(fuse.run, [*argv, *QUIET])


def test_sentence_encoders_keep_their_modules(text: str, tmp_path: Path) -> None:
    """One stream: the similarities of the fused encoder are nearer to all parents' than any parent's own are."""
    parents = make_pair(published.sentence, tmp_path)
    assert run("--parents", *parents, "--data.path", text, "--width", "2", "--output", str(tmp_path / "fused")) == 0
    model = tmp_path / "fused" / "model"
    settings = json.loads((model / "1_Pooling" / "config.json").read_text())
    assert settings == {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}
    assert (model / "modules.json").read_text() == (Path(parents[0]) / "modules.json").read_text()
    rows = {row.name: row.agreement for row in Report.load(tmp_path / "fused" / "report").rows}
    assert rows["ensemble"] == 1
    assert rows["fused"] > max(rows["parent sentence-1"], rows["parent sentence-2"]) + 0.05
    sentences = pytest.importorskip("sentence_transformers")
    encoder = sentences.SentenceTransformer(str(model), device="cpu")
    assert encoder.encode(lines(2)).shape == (2, 64)


def test_encoders_without_a_head_in_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = make_pair(published.sentence, tmp_path)
    (tmp_path / "other").mkdir()
    published.sentence(tmp_path / "other", "cls_token")
    other = str(tmp_path / "other")
    taught = ("--refine.method", "gradient", "--refine.steps", "2")
    cases: dict[str, tuple[str, ...]] = {
        "takes mean": ("--parents", first, other, "--data.path", text),
        "no outputs to be taught": ("--parents", first, second, "--data.path", text, "--compare", "distilled"),
        "leave refine.method at none": ("--parents", first, second, "--data.path", text, *taught),
        "nothing says which data": ("--parents", first, second),
    }
    for words, argv in cases.items():
        assert run(*argv, "--output", str(tmp_path / "out")) == 2
        assert words in capsys.readouterr().err.strip().splitlines()[-1]
        assert not (tmp_path / "out").exists()
    assert main(finetune.run, ["--model", first, "--data.path", text, "--logger", "none"]) == 2
    assert "on it: finetune.py --task text-classification" in capsys.readouterr().err
    chosen = ("--data.pooling", "cls", "--report", "none", "--output", str(tmp_path / "chosen"))
    assert run("--parents", first, other, "--data.path", text, *chosen) == 0
    modules = json.loads((Path(first) / "modules.json").read_text())
    (Path(first) / "modules.json").write_text(json.dumps([*modules, {"path": "3_Dense", "type": "a.models.Dense"}]))
    assert run("--parents", first, second, "--data.path", text, "--output", str(tmp_path / "out")) == 2
    assert "behind the encoder stands a Dense with weights of its own" in capsys.readouterr().err


def test_an_adapter_is_a_parent_of_the_commands(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft")
    first, second = make_pair(published.qwen2, tmp_path)
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    base = transformers.AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32)
    adapted = peft.get_peft_model(base, config)
    adapted.peft_config["default"].base_model_name_or_path = first
    adapted.save_pretrained(tmp_path / "adapter")
    parents = [str(tmp_path / "adapter"), second]
    argv = ["--parents", *parents, "--data.path", text, "--output", str(tmp_path / "fused")]
    assert run(*argv) == 0, capsys.readouterr().err
    names = {file.name for file in (tmp_path / "fused" / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.startswith("adapter") for name in names)
    own, found = adapted.merge_and_unload().state_dict(), load_model(tmp_path / "adapter").state_dict()
    assert all(torch.allclose(found[name], tensor.float(), atol=1e-5) for name, tensor in own.items())


def test_outputs_of_a_head_are_no_embeddings(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parents = make_pair(published.modernbert, tmp_path)
    argv = ("--parents", *parents, "--data.path", text, "--task", "feature-extraction")
    assert run(*argv, "--output", str(tmp_path / "fused")) == 2
    assert "a ModernBertForMaskedLM has a head" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "fused").exists()


def test_tasks_by_the_names_of_others(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parents = make_pair(published.gpt2, tmp_path)
    argv = ("--parents", *parents, "--data.path", text, "--dry-run", "--task")
    assert run(*argv, "text-generation") == 0
    capsys.readouterr()
    assert run(*argv, "masked-language-modeling") == 2  # is known, and not what a GPT-2 has a token for
    assert "no cls_token" in capsys.readouterr().err
    assert run(*argv, "text-generatoin") == 2
    assert "did you mean 'text-generation'" in capsys.readouterr().err


def test_paddings_of_two_sizes_are_one_vocabulary(text: str, tmp_path: Path) -> None:
    """models of one tokenizer, padded to other round numbers are fused in one stream, and evaluated together."""
    first, second = make_pair(published.qwen2, tmp_path)
    wider = transformers.AutoModelForCausalLM.from_pretrained(second)
    wider.resize_token_embeddings(448)
    wider.save_pretrained(second)
    common = ("--data.path", text)
    assert run("--parents", first, second, *common, "--output", str(tmp_path / "fused")) == 0
    assert json.loads((tmp_path / "fused" / "model" / "config.json").read_text())["vocab_size"] == 384
    assert main(evaluate.run, ["--models", first, second, *common, "--logger", "none"]) == 0


def test_fewer_outputs_than_tokens_are_the_error(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parents = make_pair(published.gpt2, tmp_path)
    for path in parents:
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        model.resize_token_embeddings(290)
        model.save_pretrained(path)
    assert run("--parents", *parents, "--data.path", text, "--output", str(tmp_path / "fused")) == 2
    words = "the GPT2LMHeadModel has rows for 290 tokens, fewer than the 300 of its tokenizer"
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
