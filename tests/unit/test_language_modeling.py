"""The next token and missing spans: what is predicted from what, in bits of the text, by models that generate."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForMaskedLM

from fusionpl.calibration.forward import logits
from fusionpl.datamodules.config import MaskedTextConfig, SpanTextConfig, TextConfig
from fusionpl.datamodules.corpora import corpus
from fusionpl.datamodules.text import CausalTextDataModule, MaskedTextDataModule, SpanTextDataModule
from fusionpl.errors import FusionError
from fusionpl.evaluation import continuation
from fusionpl.evaluation.barrier import interpolation
from fusionpl.evaluation.bench import Cost
from fusionpl.evaluation.encoders import bench_for
from fusionpl.evaluation.measuring import Beside, measure
from fusionpl.evaluation.metrics import evaluate, evaluate_ensemble
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import Row
from fusionpl.families.binding import bind
from fusionpl.fusion.average import vanilla
from fusionpl.fusion.config import FuseConfig
from fusionpl.models.build import build_model
from fusionpl.models.config import ModelConfig
from fusionpl.models.heads import with_classifier
from fusionpl.models.load import load_model
from fusionpl.models.save import save_model
from fusionpl.models.tokenizers import train_bpe, train_wordpiece
from tests.integration.runs import make_corpus

COMMON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
GROUPED = {**COMMON, "num_key_value_heads": 1, "intermediate_size": 24}
CAUSAL: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {**COMMON, "n_positions": 32},
    "GPTNeoXForCausalLM": {**COMMON, "intermediate_size": 24},
    "LlamaForCausalLM": GROUPED,
    "Qwen2ForCausalLM": GROUPED,
    "Qwen3ForCausalLM": {**GROUPED, "head_dim": 8},
}
T5 = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 24, "dropout_rate": 0.0}
ARCHITECTURES = pytest.mark.parametrize("name", CAUSAL)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_corpus(tmp_path / "corpus")


def causal(folder: Path | str = "pydoc", tokenizer: Any = None, **options: Any) -> CausalTextDataModule:
    settings = {"vocab_size": 300, "block_size": 24, **options}
    return CausalTextDataModule(TextConfig(path=str(folder), **settings), 0, tokenizer)


def spans(folder: Path | str, **options: Any) -> SpanTextDataModule:
    return SpanTextDataModule(SpanTextConfig(path=str(folder), **{"vocab_size": 320, "block_size": 40, **options}))


def built(name: str, data: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    args = {**CAUSAL, "T5ForConditionalGeneration": T5}[name]
    config = ModelConfig("transformers", name, args)
    return build_model(config, num_classes=data.num_classes, args=data.model_args()).eval()


def test_every_token_but_the_first_is_predicted_once(folder: Path) -> None:
    data = causal(folder)
    part = data.dataset("test").tensors
    ids, labels = part["input_ids"], part["labels"]
    assert ids.shape == labels.shape == (len(ids), 24)
    assert torch.equal(ids[:, 1:], labels[:, :-1])
    assert torch.equal(ids[1:, 0], labels[:-1, -1])
    text = data.tokenizer.decode(torch.cat([ids[0, :1], labels.flatten()]))
    whole = "".join(f"{text}\n" for text in corpus(str(folder), None, None, streaming=False)["test"]["text"])
    assert whole.startswith(text)
    assert len(whole) - len(text) < 24 * 30


def test_batches_hold_what_models_read(folder: Path) -> None:
    for data in (causal(folder), spans(folder)):
        for loader in (data.train_dataloader(), data.val_dataloader(), data.calibration_dataloader(8)):
            batch = next(iter(loader))
            assert torch.equal(batch["attention_mask"], torch.ones_like(batch["input_ids"]))
            assert batch["labels"].shape == batch.get("decoder_input_ids", batch["input_ids"]).shape


@ARCHITECTURES
def test_causal_models_are_built_and_see_no_label(name: str, folder: Path) -> None:
    data = causal(folder)
    model = built(name, data)
    data.check_model(model)
    assert model.config.tie_word_embeddings == (name == "GPT2LMHeadModel")
    output = model(**{key: value for key, value in next(iter(data.test_dataloader())).items() if key != "labels"})
    assert output.past_key_values is None
    assert model.generation_config.use_cache
    assert model.generation_config.eos_token_id == data.tokenizer.eos_token_id


@ARCHITECTURES
def test_the_loss_is_transformers_own(name: str, folder: Path) -> None:
    data = causal(folder)
    model = built(name, data)
    part = data.dataset("test").tensors
    blocks = torch.cat([part["input_ids"], part["labels"][:, -1:]], 1)
    with torch.no_grad():
        wanted = float(model(input_ids=blocks, labels=blocks).loss)  # shifts labels itself
    found = evaluate(model, data.test_dataloader())
    assert found["loss"] == pytest.approx(wanted, rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_caches_are_off_after_loading_too(folder: Path, tmp_path: Path) -> None:
    data = causal(folder)
    save_model(built("LlamaForCausalLM", data), tmp_path / "run" / "model", tokenizer=data.tokenizer)
    model: Any = load_model(tmp_path / "run")
    assert not model.config.use_cache
    assert model.generation_config.use_cache
    assert model(torch.zeros(1, 3, dtype=torch.long)).past_key_values is None


def test_models_that_look_ahead_are_refused(folder: Path) -> None:
    data = causal(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForMaskedLM(BertConfig(vocab_size=data.num_classes, max_position_embeddings=24, **sizes))
    with pytest.raises(FusionError, match="a BertForMaskedLM sees the tokens that it should predict"):
        data.check_model(model)
    with pytest.raises(FusionError, match=r"data.block_size is 40, but the model has 32 positions"):
        causal(folder, block_size=40).check_model(built("GPT2LMHeadModel", data))


@pytest.mark.parametrize("trained", ["bytes", "words"])
def test_bits_per_byte_are_those_of_the_text_for_any_tokenizer(trained: str, tmp_path: Path) -> None:
    rows = [
        "Zwölf  Boxkämpfer jagen\n",
        "",
        "  Viktor quer über ",
        "den großen Sylter Deich. 𝔘𝔫𝔦 ",
        "\n\n",
        "日本語 text",
    ]
    for part in ("train", "validation", "test"):
        datasets.Dataset.from_dict({"text": rows * 20}).to_parquet(tmp_path / "odd" / f"{part}.parquet")
    special = {"eos_token": "<|endoftext|>"}
    tokenizer = train_bpe(rows, 280, special) if trained == "bytes" else train_wordpiece(rows * 2, 200)
    data = causal(tmp_path / "odd", tokenizer, block_size=1)
    tokens = data.dataset("test").tensors["labels"].numel()
    lines = [f"{row}\n" if row and not row.endswith("\n") else row for row in rows]
    encoded = [tokenizer(line, add_special_tokens=False, return_offsets_mapping=True) for line in lines]
    first = next(span[1] for span in encoded[0]["offset_mapping"])
    whole = 20 * len("".join(lines).encode()) - len(lines[0][:first].encode())
    if trained == "words":  # what is left out behind the last token belongs to a token that never came
        assert tokens == 20 * sum(len(one["input_ids"]) for one in encoded) - 1
    assert data.derived({"loss": math.log(2)})["bits_per_byte"] == pytest.approx(tokens / whole)


def test_bits_per_byte_of_predicting_bytes_alike(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "corpus")
    data = causal(folder, vocab_size=258)  # bytes and two special tokens: a token is a byte
    assert data.num_classes == 258
    assert data.derived({"loss": 8 * math.log(2)})["bits_per_byte"] == pytest.approx(8)


@pytest.mark.slow
def test_tokenizers_are_the_same_in_every_process() -> None:
    code = (
        "from fusionpl.datamodules.config import *; from fusionpl.datamodules.text import *;"
        "made = [CausalTextDataModule(TextConfig(vocab_size=500))];"
        "made += [MaskedTextDataModule(MaskedTextConfig(vocab_size=500))];"
        "print(*(one.tokenizer.backend_tokenizer.to_str() for one in made), sep='\\n')"
    )
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(root), "PYTHONHASHSEED": "3"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env, cwd=root)
    found = causal(vocab_size=500).tokenizer
    masked = MaskedTextDataModule(MaskedTextConfig(vocab_size=500)).tokenizer
    assert other.stdout.splitlines() == [one.backend_tokenizer.to_str() for one in (found, masked)]
    assert len(found) == 500
    assert found.pad_token_id != found.eos_token_id  # the padding token's embedding is never trained


def test_the_baseline_is_the_loss_of_frequencies(folder: Path) -> None:
    data = causal(folder)
    counts = torch.bincount(data.dataset("train").tensors["input_ids"][:, 1:].flatten(), minlength=300) + 1.0
    labels = data.dataset("test").tensors["labels"].flatten()
    wanted = cross_entropy(counts.log().expand(len(labels), -1), labels)
    assert data.baseline()["unigram_loss"] == pytest.approx(float(wanted), rel=1e-5)
    assert 0 < spans(folder).baseline()["unigram_loss"] < math.log(320)


def test_streamed_text_has_next_tokens_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusionpl.datamodules.corpora.STREAMED_DOCUMENTS", 20)
    data = causal(folder, streaming=True, batch_size=4)
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (4, 24)
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
    assert data.baseline()["unigram_loss"] > 0
    assert data.derived({"loss": 1.0})["bits_per_byte"] > 0


def test_spans_put_back_are_the_text(folder: Path) -> None:
    data = spans(folder)
    original, tokenizer = data.dataset("train").tensors["input_ids"], data.tokenizer
    torch.manual_seed(0)
    made = data.objective.examples(original)
    sentinels = [token for token in tokenizer.all_special_ids if "extra_id" in tokenizer.convert_ids_to_tokens(token)]
    assert len(sentinels) == 2  # 15 % of 40 tokens are 6, in spans of 3
    for row, (read, asked) in enumerate(zip(made["input_ids"].tolist(), made["labels"].tolist(), strict=True)):
        assert read[-1] == asked[-1] == tokenizer.eos_token_id
        missing: dict[int, list[int]] = {}
        for token in asked[:-1]:
            if token in sentinels:
                missing[token] = []
            else:
                missing[next(reversed(missing))].append(token)
        restored = [token for one in read[:-1] for token in (missing[one] if one in sentinels else [one])]
        assert restored == original[row].tolist()
        assert sum(map(len, missing.values())) == 6
    assert torch.equal(made["decoder_input_ids"][:, 1:], made["labels"][:, :-1])
    assert (made["decoder_input_ids"][:, 0] == tokenizer.pad_token_id).all()
    again = data.objective.examples(original)
    assert not torch.equal(made["input_ids"], again["input_ids"])


def test_no_seed_changes_the_spans_of_evaluation(folder: Path) -> None:
    first, second = (SpanTextDataModule(SpanTextConfig(path=str(folder), vocab_size=320), seed) for seed in (1, 2))
    assert torch.equal(first.dataset("test").tensors["labels"], second.dataset("test").tensors["labels"])


def test_a_t5_reads_spans_and_its_loss_is_its_own(folder: Path) -> None:
    data = spans(folder)
    model = built("T5ForConditionalGeneration", data)
    data.check_model(model)
    batch = {key: value for key, value in data.dataset("test").tensors.items() if key != "decoder_input_ids"}
    with torch.no_grad():
        wanted = float(model(**batch).loss)  # shifts labels itself, by the config's decoder_start_token_id
    assert evaluate(model, data.test_dataloader())["loss"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: causal(folder, block_size=0), "data.block_size is 0; a block has at least 1 token"),
        (lambda folder: causal(folder, vocab_size=100), "data.vocab_size 100 is too small: bytes and special tokens"),
        (lambda folder: causal(folder, block_size=9000), "is too small for one block of 9000 tokens"),
        (lambda folder: spans(folder, block_size=1), "data.block_size is 1; of a block something is cut out"),
    ],
)
def test_a_mistake_is_one_line(make: Any, message: str, folder: Path) -> None:
    with pytest.raises(FusionError, match=message):
        make(folder).dataset("train")


def test_tokenizers_of_another_task_are_told_what_they_lack(folder: Path) -> None:
    tokenizer = causal(folder).tokenizer
    with pytest.raises(FusionError, match="the tokenizer has no cls_token, which this task needs"):
        MaskedTextDataModule(MaskedTextConfig(path=str(folder)), 0, tokenizer).dataset("test")
    with pytest.raises(FusionError, match="the tokenizer has no <extra_id_0>, and blocks with 3 spans need as many"):
        SpanTextDataModule(SpanTextConfig(path=str(folder)), 0, tokenizer).dataset("test")
    with pytest.raises(FusionError, match="GPT2Config has no argument 'n_embed'; did you mean 'n_embd'"):
        build_model(ModelConfig("transformers", "GPT2LMHeadModel", {"n_embed": 8}), num_classes=9)


@ARCHITECTURES
def test_ensemble_average_barrier_and_continuation(name: str, folder: Path) -> None:
    data = causal(folder)
    models = [built(name, data, seed) for seed in (0, 1)]
    batches = list(data.test_dataloader())
    plain = vanilla(models, [0.5, 0.5])
    assert plain is not None
    curve = interpolation(models[0], models[0].state_dict(), models[1].state_dict(), batches, points=3)
    assert curve.loss[1] == pytest.approx(evaluate(plain, batches)["loss"], rel=1e-4)
    assert evaluate_ensemble(models, batches)["loss"] < max(curve.loss)
    assert continuation(plain, data.tokenizer, data.prompt)


def test_a_continuation_is_the_likeliest_token_each_time(folder: Path) -> None:
    data = causal(folder)
    model = built("GPT2LMHeadModel", data).train()
    ids = data.prompt
    for _ in range(5):
        with torch.no_grad():
            scores = logits(model.eval(), {"input_ids": ids[None]})[0, -1]
        ids = torch.cat([ids, scores.argmax()[None]])
    wanted = data.tokenizer.decode(ids[len(data.prompt) :])
    assert continuation(model.train(), data.tokenizer, data.prompt, tokens=5) == wanted
    assert model.training
    longest = 32 - len(data.prompt)  # the model has no more positions
    found = [continuation(model, data.tokenizer, data.prompt, tokens=count) for count in (longest, 99)]
    assert found[0] == found[1]
    with pytest.raises(FusionError, match="a Linear can't go on with a text"):
        continuation(torch.nn.Linear(1, 1), data.tokenizer, data.prompt)


def test_a_report_shows_how_models_go_on(folder: Path, tmp_path: Path) -> None:
    data = causal(folder)
    parents = {}
    for seed in (1, 2):
        save_model(built("GPT2LMHeadModel", data, seed), tmp_path / f"seed-{seed}" / "model", tokenizer=data.tokenizer)
        parents[f"seed-{seed}"] = str(tmp_path / f"seed-{seed}")
    model = load_model(parents["seed-1"])
    result: Any = SimpleNamespace(
        config=FuseConfig(),
        refitted=None,
        warnings=[],
        matchings=[],
        notes=[],
        model=model,
        binding=bind(model),
        parents=[],
    )
    report = Report()
    bench = bench_for(report, data, torch.device("cpu"))
    beside = Beside({name: partial(load_model, path) for name, path in parents.items()})
    measure(bench, result, Cost("unlabelled data", 1.0), beside, full=False)
    assert set(report.continuations) == {"parent seed-1", "parent seed-2", "vanilla", "fused"}
    assert report.continuations["fused"] == report.continuations["parent seed-1"]
    assert report.prompt == data.tokenizer.decode(data.prompt)
    assert all(row.bits_per_byte is not None for row in report.rows)
    report.save(tmp_path / "report")
    again = Report.load(tmp_path / "report")
    assert (again.prompt, again.continuations) == (report.prompt, report.continuations)
    assert "## Continuations" in (tmp_path / "report" / "report.md").read_text()
    assert "continuations" in json.loads((tmp_path / "report" / "report.json").read_text())


def test_what_models_say_does_not_break_the_table() -> None:
    report = Report([Row("fused", loss=1.0)], prompt="a\n", continuations={"fused": "b | `c` ``\n"})
    assert "| prompt | ` a⏎ ` |" in report.markdown()
    assert "| fused | ``` b \\| `c` ``⏎ ``` |" in report.markdown()
    assert "Continuations" not in Report([Row("fused", loss=1.0)]).markdown()


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_a_classifier_is_put_on_a_causal_model(name: str, folder: Path) -> None:
    data = causal(folder)
    model = with_classifier(built(name, data), 3, ("a", "b", "c"), seed=0)
    rows = data.tokenizer.pad(data.tokenizer(["the cat runs", "dog"]), return_tensors="pt")
    assert logits(model, rows).shape == (2, 3)
