"""Masked text: fixed splits and masks, tokenizers that are the same everywhere, and what a mistake is told."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from fusionpl.datamodules import IGNORED, MaskedTextConfig, MaskedTextDataModule
from fusionpl.datamodules.corpora import corpus
from fusionpl.datamodules.text import check_length
from fusionpl.errors import FusionError
from fusionpl.models import check_tokenizers, load_tokenizer, save_model, train_wordpiece
from tests.integration.runs import WORDS, make_corpus

PARTS = ("train", "validation", "calibration", "test")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_corpus(tmp_path / "corpus")


def module(folder: Path | str = "pydoc", seed: int = 0, **options: Any) -> MaskedTextDataModule:
    settings = {"vocab_size": 300, "block_size": 16, **options}
    return MaskedTextDataModule(MaskedTextConfig(path=str(folder), **settings), seed)


def tiny_bert(tokens: int, positions: int) -> BertForMaskedLM:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return BertForMaskedLM(BertConfig(vocab_size=tokens, max_position_embeddings=positions, **sizes))


def batches(data: MaskedTextDataModule, epoch: int = 0) -> list[dict[str, torch.Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    torch.manual_seed(epoch)
    return list(loader)


def test_topics_of_pydoc_are_in_one_part_only() -> None:
    found = corpus("pydoc", None, None, streaming=False)
    texts = [text for part in PARTS for text in found[part]["text"]]
    from pydoc_data.topics import topics

    assert sorted(texts) == sorted(topics.values())
    sizes = {part: sum(map(len, found[part]["text"])) / sum(map(len, texts)) for part in PARTS}
    assert sizes["train"] > 0.7
    assert min(sizes.values()) > 0.03


def test_no_seed_changes_the_split_or_the_evaluation_masks(folder: Path) -> None:
    first, second = module(folder, seed=1), module(folder, seed=2)
    for part in PARTS[1:]:
        for key, tensor in first.dataset(part).tensors.items():
            assert torch.equal(tensor, second.dataset(part).tensors[key])
    assert torch.equal(first.dataset("train").tensors["input_ids"], second.dataset("train").tensors["input_ids"])


def test_evaluation_masks_leave_the_global_generator_alone(folder: Path) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    module(folder).dataset("test")
    assert torch.equal(torch.rand(1), wanted)


def test_order_and_masks_of_training_follow_seed_and_epoch(folder: Path) -> None:
    first, again, other = (batches(module(folder, seed), 1) for seed in (1, 1, 2))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(first, again, strict=True) for key in a)
    assert any(not torch.equal(a["labels"], b["labels"]) for a, b in zip(first, other, strict=True))
    later = batches(module(folder, 1), 2)
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, later, strict=True))


def test_masking_is_15_percent_of_which_80_10_10() -> None:
    data = module(block_size=64, vocab_size=1000)
    original, masked = data.dataset("train").tensors["input_ids"], batches(data)
    ids, labels = (torch.cat([batch[key] for batch in masked]) for key in ("input_ids", "labels"))
    scored = labels != IGNORED
    assert len(ids) == len(original)
    assert not (scored & torch.isin(labels, torch.tensor(data.tokenizer.all_special_ids))).any()
    assert scored.float().mean() == pytest.approx(0.15 * 62 / 64, abs=0.005)
    assert (ids[scored] == data.tokenizer.mask_token_id).float().mean() == pytest.approx(0.8, abs=0.02)
    assert (ids[scored] == labels[scored]).float().mean() == pytest.approx(0.1, abs=0.02)
    restored = torch.where(scored, labels, ids)
    assert torch.equal(restored.sort(0).values, original.sort(0).values)


def test_blocks_are_whole_and_framed(folder: Path) -> None:
    data = module(folder)
    ids = data.dataset("train").tensors["input_ids"]
    assert ids.shape[1] == 16
    assert (ids[:, 0] == data.tokenizer.cls_token_id).all()
    assert (ids[:, -1] == data.tokenizer.sep_token_id).all()
    assert not torch.isin(ids[:, 1:-1], torch.tensor(data.tokenizer.all_special_ids)).any()
    assert len(module(folder, train_limit=5).dataset("train")) == 5


def test_the_baseline_is_the_loss_of_frequencies(folder: Path) -> None:
    data = module(folder)
    counts = torch.ones(len(data.tokenizer), dtype=torch.float64)
    for token in data.dataset("train").tensors["input_ids"][:, 1:-1].flatten().tolist():
        counts[token] += 1
    labels = data.dataset("test").tensors["labels"].flatten()
    losses = [-float(torch.log(counts[label] / counts.sum())) for label in labels.tolist() if label != IGNORED]
    assert data.baseline()["unigram_loss"] == pytest.approx(sum(losses) / len(losses))


def test_a_corpus_without_training_text_trains_on_its_validation_part(tmp_path: Path) -> None:
    found = corpus(str(make_corpus(tmp_path / "c", ("validation", "test"))), None, None, streaming=False)
    whole = corpus(str(make_corpus(tmp_path / "d", ("train", "test"))), None, None, streaming=False)
    assert found["test"]["text"] == whole["test"]["text"]
    assert found["train"]["text"] == whole["train"]["text"]


def test_a_local_folder_stands_in_for_a_hub_id_and_its_configuration(folder: Path) -> None:
    named = module(folder, name="wikitext-2-raw-v1").dataset("test").tensors["input_ids"]
    assert torch.equal(named, module(folder).dataset("test").tensors["input_ids"])


def test_text_files_are_read_as_parquet_is(folder: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for split in ("train", "test"):
        (plain / f"{split}.txt").write_text("\n".join(datasets.load_dataset(str(folder))[split]["text"]))
    ids = module(plain).dataset("test").tensors["input_ids"]
    assert torch.equal(ids, module(folder).dataset("test").tensors["input_ids"])


def test_streamed_text_is_served_in_an_order_of_the_seed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusionpl.datamodules.corpora.STREAMED_DOCUMENTS", 20)
    first, again, other = (list(module(folder, seed, streaming=True).train_dataloader()) for seed in (1, 1, 2))
    assert first[0]["input_ids"].shape == (32, 16)
    assert len(first) == len(again)
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, other, strict=False))


def test_saved_tokenizers_load_and_match(folder: Path, tmp_path: Path) -> None:
    tokenizer = module(folder).tokenizer
    save_model(tiny_bert(len(tokenizer), 16), tmp_path / "run" / "model", tokenizer=tokenizer)
    loaded = load_tokenizer(tmp_path / "run")
    assert loaded is not None
    check_tokenizers({"a": tokenizer, "b": loaded})
    assert loaded("red cat")["input_ids"] == tokenizer("red cat")["input_ids"]
    assert loaded.mask_token == "[MASK]"
    assert module(folder, tokenizer=str(tmp_path / "run")).tokenizer.get_vocab() == tokenizer.get_vocab()


def test_tokenizers_that_differ_are_told_apart() -> None:
    one = train_wordpiece([" ".join(WORDS)] * 2, 60)
    more = train_wordpiece([" ".join(WORDS)] * 2, 70)
    other = train_wordpiece([" ".join(WORDS).replace("cat", "zoo")] * 2, 60)
    with pytest.raises(FusionError, match=r"different tokenizers: a has \d+ tokens, b has \d+; train both with one"):
        check_tokenizers({"a": one, "b": more})
    with pytest.raises(FusionError, match=r"token \d+ is '.+' in a and '.+' in b"):
        check_tokenizers({"a": one, "b": other})
    with pytest.raises(FusionError, match="a has one, b has none"):
        check_tokenizers({"a": one, "b": None})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_column": "body"}, r"no text column 'body'; its columns of text are text, title: name one with"),
        ({"block_size": 5000}, r"part of '.+' is too small for one block of 5000 tokens; lower --data.block_size"),
        ({"block_size": 2}, r"data.block_size is 2; a block is \[CLS\], text and \[SEP\]"),
        ({"vocab_size": 20}, r"data.vocab_size 20 is too small: the training text has \d+ letters"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FusionError, match=message) as caught:
        module(folder, **options).dataset("train")
    assert "\n" not in str(caught.value)


def test_empty_text_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(FusionError, match="no data set at"):
        module(tmp_path / "nowhere").dataset("train")
    with pytest.raises(FusionError, match="the training text is empty"):
        train_wordpiece(["", "  "], 100)
    datasets.Dataset.from_dict({"text": ["one"]}).to_parquet(tmp_path / "small" / "train.parquet")
    with pytest.raises(FusionError, match="the corpus is too small: 1 documents"):
        module(tmp_path / "small").dataset("train")


@pytest.mark.parametrize(("kind", "allowed"), [("roberta", 18), ("xlm-roberta", 18), ("camembert", 18), ("opt", 20)])
def test_positions_behind_the_paddings_are_fewer(kind: str, allowed: int) -> None:
    """OPT's table has two rows more than it says, RoBERTa's says how many rows it has."""
    model = SimpleNamespace(config=SimpleNamespace(model_type=kind, max_position_embeddings=20))
    check_length(model, allowed, "data.block_size")
    with pytest.raises(FusionError, match=f"data.block_size is {allowed + 1}, but the model has {allowed} positions"):
        check_length(model, allowed + 1, "data.block_size")


def test_blocks_longer_than_the_models_positions(folder: Path) -> None:
    model = tiny_bert(300, 12)
    with pytest.raises(FusionError, match=r"data.block_size is 16, but the model has 12 positions"):
        module(folder).check_model(model)
