"""Masked text: fixed splits and masks, tokenizers that are the same everywhere, and what a mistake is told."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from fusionpl.datamodules.base import IGNORED
from fusionpl.datamodules.config import MaskedTextConfig
from fusionpl.datamodules.corpora import corpus
from fusionpl.datamodules.text import MaskedTextDataModule, check_length
from fusionpl.errors import FusionError
from fusionpl.models.pipelines import check_tokenizers
from fusionpl.models.save import save_model
from fusionpl.models.tokenizers import load_tokenizer, train_wordpiece
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
    with pytest.raises(FusionError, match="the training text is empty"):
        module(tmp_path / "small").dataset("train")
    (tmp_path / "blank.txt").write_text("\n \n\n")
    with pytest.raises(FusionError, match=r"blank.txt' holds no text; name another with --data.path"):
        module(tmp_path / "blank.txt").dataset("train")


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


SENTENCE = "the red cat runs under the green bridge quickly and sleeps"


def known(path: Path | str, **options: Any) -> MaskedTextDataModule:
    """Text for a model that has its tokenizer."""
    return MaskedTextDataModule(
        MaskedTextConfig(path=str(path), **{"block_size": 16, **options}), 0, train_wordpiece([SENTENCE] * 3, 100)
    )


def sizes(data: MaskedTextDataModule) -> list[int]:
    return [len(data.dataset(part)) for part in PARTS]


def write(file: Path, text: str, **options: Any) -> Path:
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text, newline="", **options)
    return file


LINES = f"{SENTENCE}\n" * 60
TABLE = "text,title\n" + f'"{SENTENCE}, he said",one\n' * 60
ROWS = f"{json.dumps({'text': SENTENCE, 'about': {'pages': [1, 2]}})}\n" * 60
FILES = {
    "text.txt": LINES,
    "text.txt.gz": LINES,
    "Text [1].TXT": LINES,
    "table.csv": TABLE,
    "table.tsv": TABLE.replace(",one", "\tone").replace("text,", "text\t"),
    "rows.jsonl": ROWS,
    "rows.json": f"[{','.join(ROWS.splitlines())}]",
    "rows.jsonl.gz": ROWS,
}


@pytest.mark.parametrize("name", FILES)
def test_one_file_is_a_corpus(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = known(write(tmp_path / name, FILES[name]))
    assert min(sizes(data)) > 0
    assert data._documents["train"][0]["text"].startswith(SENTENCE)
    assert f"{name}: " in (said := capsys.readouterr().out)
    assert "characters are little text; a fifth of them is for calibration" in said


def test_parquet_files_and_folders_of_text(folder: Path, tmp_path: Path) -> None:
    assert min(sizes(known(folder / "train.parquet"))) > 0
    for name in ("a.txt", "b.txt", "README.md", "LICENSE", ".DS_Store"):
        write(tmp_path / "plain" / name, LINES)
    plain = known(tmp_path / "plain")
    assert sum(len(plain._documents[part]) for part in PARTS) == 120


def test_marks_of_windows_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "windows.txt"
    file.write_bytes(b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode())
    assert set(known(file)._documents["train"]["text"]) == {SENTENCE}


def test_rows_without_text_are_empty(tmp_path: Path) -> None:
    file = write(tmp_path / "gaps.csv", "text,n\n" + f'"{SENTENCE}\n{SENTENCE}",1\n\n,2\n' * 40)
    assert min(sizes(known(file))) > 0
    assert known(file)._documents["train"][0]["text"] == f"{SENTENCE}\n{SENTENCE}"


@pytest.mark.parametrize(
    "text", [f"{SENTENCE} " * 200, f"{SENTENCE} " * 70 + "\n" + f"{SENTENCE} " * 80, "catdog" * 900]
)
def test_few_documents_are_cut_between_words(text: str, tmp_path: Path) -> None:
    data = known(write(tmp_path / "long.txt", text))
    parts = {part: data._documents[part]["text"] for part in PARTS}
    assert "".join(parts[part][0] for part in ("train", "calibration", "validation", "test")) == text
    for part, share in {"test": 0.1, "validation": 0.045, "calibration": 0.171}.items():
        assert len(parts[part][0]) / len(text) == pytest.approx(share, abs=0.02)


def test_text_of_a_block_or_two_is_for_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = known(write(tmp_path / "tiny.txt", f"{SENTENCE} " * 4))
    assert [len(data.dataset(part)) for part in PARTS[1:]] == [0, 3, 0]
    assert (
        "tiny.txt: little text; all that nothing is tested on, 3 blocks, is for calibration" in capsys.readouterr().out
    )
    with pytest.raises(
        FusionError, match=r"the validation part of '.+tiny.txt' is too small for one block of 16 tokens"
    ):
        data.train_dataloader()


def test_only_some_names_say_a_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one.txt", "two.txt", "my_test.txt"):
        write(tmp_path / "some" / name, LINES)
    known(tmp_path / "some").dataset("test")
    said = capsys.readouterr().out
    assert "some: 2 files are not read, one.txt first: names of others have train, validation or test in them" in said
    assert "some: no train split; test is used as one" in said


def mixed(home: Path) -> Path:
    write(home / "mixed" / "a.txt", LINES)
    return write(home / "mixed" / "b.csv", TABLE).parent


def latin(home: Path) -> Path:
    return write(home / "latin.txt", "caf\u00e9\n" * 40, encoding="latin-1")


UNREADABLE: dict[str, tuple[Any, str]] = {
    "another kind": (
        lambda home: write(home / "a.docx", "x"),
        r"a.docx is no data file; --data.path reads .txt, .csv,",
    ),
    "a folder of others": (
        lambda home: write(home / "docs" / "a.docx", "x").parent,
        "docs has no data files; --data.p",
    ),
    "several kinds": (mixed, "has data files of several kinds, 1 of text and 1 of csv; keep one kind there, or name a"),
    "latin-1": (latin, r"latin.txt': its text isn't UTF-8; convert it, for example by iconv -f latin1 -t utf-8"),
    "nothing": (lambda home: write(home / "a.txt", ""), "cannot read the data set '.+a.txt': it is empty"),
    "a row too long": (lambda home: write(home / "a.csv", "a,b\n1,2\n1,2,3\n"), "Expected 2 fields in line 3, saw 3"),
    "broken JSON": (
        lambda home: write(home / "a.jsonl", '{"text": "a"}\n{text}\n'),
        "JSON parse error: Missing a name",
    ),
    "no file": (
        lambda home: home / "a.txt",
        r"no data set at .+a.txt; --data.path takes a built-in name \(digits, pydoc",
    ),
    "no file of that name": (lambda home: "corpus.txt", r"no data set at corpus.txt; --data.path takes"),
    "no name": (lambda home: "", r"no data set at ''; --data.path takes"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_one_line(name: str, tmp_path: Path) -> None:
    make, words = UNREADABLE[name]
    with pytest.raises(FusionError, match=words) as caught:
        known(make(tmp_path)).dataset("calibration")
    assert "\n" not in str(caught.value)
