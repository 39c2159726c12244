"""Parents that number the same tokens differently, or have added tokens of their own."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fusionpl import fuse, load_config
from fusionpl.errors import FusionError
from fusionpl.models.pipelines import check_tokenizers
from fusionpl.models.save import save_model
from fusionpl.models.tokenizers import train_wordpiece
from fusionpl.models.vocabulary import Vocabulary, load_parent
from tests.integration.runs import WORDS
from tests.models_for_tests import largest_difference, redrawn, text_outputs

ROWS = ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias", "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias")  # fmt: skip
SPECIAL = 5  # tokens that stay in their places


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_wordpiece([" ".join(WORDS)] * 3, 100)


def rebuilt(tokenizer: Any, edit: Callable[[dict[str, Any]], object]) -> PreTrainedTokenizerBase:
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    edit(parts)
    backend = tokenizers.Tokenizer.from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer.special_tokens_map)


def order(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """New number -> old number."""
    moved = torch.randperm(len(tokenizer) - SPECIAL, generator=torch.Generator().manual_seed(1)) + SPECIAL
    return torch.cat([torch.arange(SPECIAL), moved])


def shuffled(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    new = {old: number for number, old in enumerate(order(tokenizer).tolist())}

    def edit(parts: dict[str, Any]) -> None:
        parts["model"]["vocab"] = {token: new[old] for token, old in parts["model"]["vocab"].items()}

    return rebuilt(tokenizer, edit)


def bert(seed: int, rows: int, *, tied: bool = True) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=rows, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=20, tie_word_embeddings=tied,
    )  # fmt: skip
    return redrawn(transformers.BertForMaskedLM(config), seed)


def with_rows(model: Any, rows: Tensor) -> nn.Module:
    """The model with other rows of its vocabulary; -1 is a row of noise."""
    config = copy.deepcopy(model.config)
    config.vocab_size = len(rows)
    found = redrawn(type(model)(config), 99)
    state = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if name in ROWS:
                parameter[rows >= 0] = state[name][rows[rows >= 0]]
            else:
                parameter.copy_(state[name])
    return found


def batch(tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    texts = [" ".join(WORDS[start:] + WORDS[:start])[:60] for start in range(len(WORDS))]
    found = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def kept(folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Path:
    save_model(model, folder, tokenizer=tokenizer)
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["none", "ridge"])
def test_another_order_of_tokens_changes_nothing(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, method: str, tied: bool
) -> None:
    a, b = (bert(seed, len(tokenizer), tied=tied) for seed in (1, 2))
    first, plain = kept(tmp_path / "a", a, tokenizer), kept(tmp_path / "b", b, tokenizer)
    other = kept(tmp_path / "other", with_rows(b, order(tokenizer)), shuffled(tokenizer))
    config = load_config(None, {"align.solver": "emd", "refit.method": method})
    wanted = fuse([first, plain], [batch(tokenizer)], config)
    found = fuse([first, other], [batch(tokenizer)], config, names=["a", "other"], output=tmp_path / "fused")
    assert largest_difference(found.model, wanted.model) == 0
    assert found.warnings == [f"other: {len(tokenizer)} rows of the vocabulary are matched by token"]
    assert not wanted.warnings
    backwards = load_config(None, {"align.solver": "emd", "refit.method": method, "anchor": 1})
    back = fuse([first, other], [batch(shuffled(tokenizer))], backwards)
    plain_back = fuse([first, plain], [batch(tokenizer)], backwards)
    assert largest_difference(with_rows(plain_back.model, order(tokenizer)), back.model) < 1e-4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["none", "ridge"])
def test_added_tokens_stay_the_anchors(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, method: str, tied: bool
) -> None:
    more, others = copy.deepcopy(tokenizer), shuffled(tokenizer)
    more.add_tokens(["[NEW]", "[NEWER]"])
    others.add_tokens(["[OTHER]"])
    rows = len(tokenizer)
    a, b = bert(1, len(more), tied=tied), bert(2, rows, tied=tied)
    first = kept(tmp_path / "a", a, more)
    other = kept(tmp_path / "b", with_rows(b, torch.cat([order(tokenizer), torch.tensor([-1])])), others)
    config = load_config(None, {"align.solver": "emd", "refit.method": method})
    result = fuse([first, other], [batch(more)], config, names=["a", "b"])
    assert result.warnings == [
        f"b: {rows} rows of the vocabulary are matched by token; 2 that only a has stay as they are there; "
        "1 that only b has are left out"
    ]
    found, own = dict(result.model.named_parameters()), dict(a.named_parameters())
    for name in ROWS:
        if name in own:
            assert torch.equal(found[name][rows:], own[name][rows:]), name
            assert not torch.isclose(found[name][:rows], own[name][:rows]).all(), name
    if method == "none":  # the rows that both have are those of a fusion without the tokens that one of them has
        short = fuse([with_rows(a, torch.arange(rows)), b], [batch(tokenizer)], config)
        assert largest_difference(short.model, with_rows(result.model, torch.arange(rows))) < 1e-5


def test_rows_beyond_the_tokens_are_matched_by_number(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = len(tokenizer)
    a, b = bert(1, rows + 4), bert(2, rows + 2)
    paths = [kept(tmp_path / name, model, tokenizer) for name, model in (("a", a), ("b", b))]
    assert fuse(paths, [batch(tokenizer)], load_config("default")).config.strategy == "joint"  # no token is lacking
    result = fuse(paths, [batch(tokenizer)], names=["a", "b"])
    assert result.warnings[0] == f"b: {rows + 4} rows of the vocabulary are matched by token"
    name = "cls.predictions.bias"
    mean = (a.get_parameter(name) + b.get_parameter(name)[torch.arange(rows + 4).clamp_max(rows + 1)]) / 2
    assert torch.allclose(result.model.get_parameter(name), mean)


def test_padding_is_none_of_the_tokens_of_the_other(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A row that pads one parent and is an added token of the other is matched with padding."""
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["[NEW]"])
    rows = len(tokenizer)
    found = Vocabulary(tokenizer, rows + 4).renumbering(more, rows + 3)
    assert found is not None
    assert not len(found.missing_tokens)
    assert found.rows[rows:].tolist() == [rows + 2, rows + 1, rows + 2, rows + 2]
    assert found.dropped == 1


def test_a_whole_parent_is_read_in_the_anchors_order(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = bert(2, len(tokenizer))
    other: Any = with_rows(model, order(tokenizer))
    other.config.eos_token_id = order(tokenizer).tolist().index(7)
    source = kept(tmp_path / "other", other, shuffled(tokenizer))
    found: Any = load_parent(source, Vocabulary(tokenizer, len(tokenizer)))
    assert torch.equal(text_outputs(found, batch(tokenizer)), text_outputs(model, batch(tokenizer)))
    assert found.config.eos_token_id == 7
    save_model(found, tmp_path / "again", tokenizer=tokenizer)
    assert largest_difference(load_parent(tmp_path / "again", None), model) == 0


def bpe(*texts: str, special: str = "<|end|>") -> PreTrainedTokenizerBase:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=60, special_tokens=[special], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special)


def cased(parts: dict[str, Any]) -> None:
    parts["normalizer"]["lowercase"] = False


def another_token(parts: dict[str, Any]) -> None:
    parts["model"]["vocab"]["zoo"] = parts["model"]["vocab"].pop("cat")


def padding_moved(parts: dict[str, Any]) -> None:
    vocabulary = parts["model"]["vocab"]
    vocabulary["[PAD]"], vocabulary["cat"] = vocabulary["cat"], vocabulary["[PAD]"]
    next(token for token in parts["added_tokens"] if token["content"] == "[PAD]")["id"] = vocabulary["[PAD]"]


def test_what_differs_in_more_than_numbers_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    other = shuffled(tokenizer)
    check_tokenizers({"a": tokenizer, "b": other})
    with pytest.raises(FusionError, match=r"different tokenizers: token \d+ is"):
        check_tokenizers({"a": tokenizer, "b": other}, renumbered=False)
    for edit in (cased, another_token, padding_moved):
        with pytest.raises(FusionError, match="different tokenizers"):
            check_tokenizers({"a": tokenizer, "b": rebuilt(other, edit)})
    one, two = bpe("a cat sleeps and a cat runs"), bpe("the dog runs and the dog sleeps")
    with pytest.raises(FusionError, match="different tokenizers"):
        check_tokenizers({"a": one, "b": two})
    with pytest.raises(FusionError, match="different tokenizers"):
        check_tokenizers({"a": one, "b": tokenizer})


def test_byte_pairs_in_another_order(tokenizer: PreTrainedTokenizerBase) -> None:
    one: Any = bpe("a cat sleeps and a cat runs")

    def backwards(parts: dict[str, Any]) -> None:
        parts["model"]["vocab"] = {token: len(one) - 1 - number for token, number in parts["model"]["vocab"].items()}
        parts["added_tokens"][0]["id"] = len(one) - 1

    check_tokenizers({"a": one, "b": rebuilt(one, backwards)})
    found = Vocabulary(one, len(one)).renumbering(rebuilt(one, backwards), len(one))
    assert found is not None
    assert found.rows.tolist() == list(range(len(one)))[::-1]


def test_named_parents_with_other_tokenizers_are_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = len(tokenizer)
    paths = [
        kept(tmp_path / "a", bert(1, rows), tokenizer),
        kept(tmp_path / "b", bert(2, rows), rebuilt(tokenizer, another_token)),
    ]
    with pytest.raises(FusionError, match=r"different tokenizers: token \d+ is 'cat' in a and 'zoo' in b"):
        fuse(paths, [batch(tokenizer)], names=["a", "b"])
