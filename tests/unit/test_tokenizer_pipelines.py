"""Tokenizers with the same tokens by the same numbers, and what else their files say."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fusionpl import fuse, load_config
from fusionpl.cli.evaluate import run as evaluate
from fusionpl.cli.fuse import run as fuse_command
from fusionpl.cli.running import main
from fusionpl.errors import FusionError
from fusionpl.models.pipelines import check_tokenizers
from fusionpl.models.tokenizers import load_tokenizer
from tests.integration.runs import WORDS
from tests.models_for_tests import redrawn

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyzÉé中文", "Cat", "CAT", "cafe"]
NAMED = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL}
Edit = Callable[[dict[str, Any]], object]


def bert_tokenizer(**settings: Any) -> PreTrainedTokenizerBase:
    """As `BertTokenizer` of transformers makes it from a list of words."""
    words = [*SPECIAL, *WORDS, *LETTERS, *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz文")]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    return transformers.BertTokenizer(vocab=vocabulary, **settings)


def byte_pairs() -> PreTrainedTokenizerBase:
    """Byte pairs in which "abc" can be made in two ways, both of tokens that are there."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|end|>", *alphabet, "ab", "bc", "abc"])}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[("a", "b"), ("b", "c"), ("ab", "c")])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")


def edited(tokenizer: Any, edit: Edit) -> PreTrainedTokenizerBase:
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    edit(parts)
    backend = tokenizers.Tokenizer.from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer.special_tokens_map)


@pytest.mark.parametrize(
    "settings", [{"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}]
)
def test_settings_of_bert_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    found = {}
    for name, one in {"a": bert_tokenizer(), "b": bert_tokenizer(**settings)}.items():
        one.save_pretrained(tmp_path / name)
        found[name] = load_tokenizer(tmp_path / name)
    with pytest.raises(FusionError, match=r"a cuts '.+' into '.+', b into '.+' \(they differ in the normalizer\)"):
        check_tokenizers(found)


def other_merges(parts: dict[str, Any]) -> None:
    parts["model"]["merges"] = [["a", "b"], ["b", "c"], ["a", "bc"]]


def split_digits(parts: dict[str, Any]) -> None:
    parts["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, parts["pre_tokenizer"]],
    }


def ends_text(parts: dict[str, Any]) -> None:
    parts["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|end|>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [0], "tokens": ["<|end|>"]}},
    }


def ends_pairs(parts: dict[str, Any]) -> None:
    ends_text(parts)
    parts["post_processor"]["pair"].append(parts["post_processor"]["single"].pop())


def strips_left(parts: dict[str, Any]) -> None:
    parts["added_tokens"][0]["lstrip"] = True


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (other_merges, r"a cuts 'abc' into 'abc', b into 'ab c' \(they differ in the model\)"),
        (ends_text, r"b into '.*<\|end\|>' \(they differ in the post_processor\)"),
        (ends_pairs, r"a joins 'a' and 'b' to '.+', b to '.+<\|end\|>' \(they differ in the post_processor\)"),
        (strips_left, r"a cuts 'a <\|end\|> b' into .+ \(they differ in the added token '<\|end\|>'\)"),
    ],
)  # fmt: skip
def test_other_steps_are_refused(edit: Edit, message: str) -> None:
    one = byte_pairs()
    check_tokenizers({"a": one, "b": edited(one, lambda parts: None)})
    with pytest.raises(FusionError, match=message):
        check_tokenizers({"a": one, "b": edited(one, edit)})


def test_another_step_that_does_nothing_is_told() -> None:
    one = byte_pairs()  # no number is one token
    (line,) = check_tokenizers({"a": one, "b": edited(one, split_digits)})
    assert line.startswith("a and b: their tokenizers differ in the pre_tokenizer, and cut ")
    assert line.endswith(" texts alike; text is read as a's does")


def test_what_only_the_data_show_is_found_in_them() -> None:
    one: Any = bert_tokenizer()

    def no_ditto(parts: dict[str, Any]) -> None:
        parts["normalizer"] = {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "〃"}, "content": "cat"}, parts["normalizer"]],
        }

    other = edited(one, no_ditto)
    line, pairs = check_tokenizers({"a": one, "b": other})
    assert line.startswith("a and b: their tokenizers differ in the normalizer, and cut ")
    assert pairs.startswith("the tokenizer of a marks the second of two texts (token_type_ids), that of b does not")
    with pytest.raises(FusionError, match="cuts 'a 〃 runs' into"):
        check_tokenizers({"a": one, "b": other}, texts=iter(["a dog runs", "a 〃 runs"]))


def test_sides_are_told_and_limits_are_not() -> None:
    one = byte_pairs()
    other = copy.deepcopy(one)
    other.padding_side, other.model_max_length = "left", 7
    (line,) = check_tokenizers({"a": one, "b": other})
    assert line == ("padding_side is right in the tokenizer of a, left in that of b: text is read as a's does")


def test_tokenizers_in_python_are_compared_by_text() -> None:
    one, other = transformers.ByT5Tokenizer(), transformers.ByT5Tokenizer()
    (line,) = check_tokenizers({"a": one, "b": other})
    assert line.startswith("a and b: their tokenizers are written in Python, whose steps can't be compared, and cut ")


def test_special_tokens_are_named() -> None:
    one = byte_pairs()
    other = copy.deepcopy(one)
    other.pad_token = None
    assert check_tokenizers({"a": one, "b": other}) == []
    other.pad_token = "ab"
    with pytest.raises(FusionError, match=r"the pad_token is '<\|end\|>' in a and 'ab' in b"):
        check_tokenizers({"a": one, "b": other})


def save_bert(folder: Path, seed: int, tokenizer: Any) -> str:
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=70,
    )  # fmt: skip
    redrawn(transformers.BertForSequenceClassification(config), seed).save_pretrained(folder)  # type: ignore[operator]
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def test_commands_read_lines_of_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one: Any = bert_tokenizer()
    replaced = {"type": "Replace", "pattern": {"String": "〃"}, "content": "cat"}
    other = edited(one, lambda parts: parts.update(
        normalizer={"type": "Sequence", "normalizers": [replaced, parts["normalizer"]]}
    ))  # fmt: skip
    paths = [save_bert(tmp_path / name, seed, one_of) for name, seed, one_of in (("a", 1, one), ("b", 2, other))]
    rows = [f"a {'〃' if row == 3 else 'dog'} runs {row},{row % 2}" for row in range(60)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    data = ["--data.path", str(tmp_path / "rows.csv"), "--data.calibration", "40", "--data.validation", "0"]
    assert main(fuse_command, ["--parents", *paths, *data, "--output", str(tmp_path / "f"), "--logger", "none"]) == 2
    summary = capsys.readouterr().err
    assert "error: parents with different tokenizers: a cuts 'a 〃 runs 3' into" in summary
    assert main(evaluate, ["--models", *paths, *data]) == 2
    assert "cuts 'a 〃 runs 3' into" in capsys.readouterr().err


def test_a_parent_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer()
    paths = [save_bert(tmp_path / "a", 1, tokenizer), save_bert(tmp_path / "b", 2, tokenizer)]
    (tmp_path / "b" / "tokenizer.json").unlink()
    batch = {"input_ids": tokenizer(["a cat"] * 4, return_tensors="pt")["input_ids"]}
    result = fuse(paths, [batch], load_config(None, {"align.solver": "emd"}), names=["a", "b"])
    assert result.warnings[0].startswith("b has no tokenizer: its tokens are taken to be those of a")
