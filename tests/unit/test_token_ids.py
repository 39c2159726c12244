"""Settings that choose the token or the position: which token's logits are read, where positions begin."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fusionpl import fuse, load_config
from fusionpl.cli.evaluate import run as evaluate
from fusionpl.cli.finetune import run as finetune
from fusionpl.cli.fuse import run as fuse_command
from fusionpl.cli.running import main
from fusionpl.errors import FusionError
from fusionpl.models.load import load_model
from fusionpl.models.tokenizers import load_tokenizer
from fusionpl.models.vocabulary import Vocabulary, load_parent
from tests.models_for_tests import redrawn, text_outputs
from tests.published import END, byte_pairs, lines
from tests.unit.test_vocabulary import order, rebuilt

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
         "max_position_embeddings": 40, "vocab_size": 300}  # fmt: skip
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 40, "vocab_size": 300}
TO_B = {
    "weights": [0.0, 1.0],
    "align.solver": "emd",
    "align.heads": "matched",
    "align.residual": "tie",
    "align.qk": "shared",
}


def gpt2(seed: int, **settings: Any) -> Any:
    return redrawn(transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**GPT2, **settings)), seed)


def llama(seed: int, **settings: Any) -> Any:
    config = transformers.LlamaConfig(**SIZES, **settings)
    return redrawn(transformers.LlamaForSequenceClassification(config), seed)


def roberta(seed: int, **settings: Any) -> Any:
    return redrawn(transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SIZES, **settings)), seed)


def clip(seed: int, **settings: Any) -> Any:
    config = transformers.CLIPTextConfig(**SIZES, projection_dim=12, **settings)
    return redrawn(transformers.CLIPTextModelWithProjection(config), seed)


def t5(seed: int, **settings: Any) -> Any:
    config = transformers.T5Config(vocab_size=300, d_model=16, d_kv=4, num_heads=4, d_ff=24, num_layers=2, **settings)
    return redrawn(transformers.T5ForConditionalGeneration(config), seed)


def saved(folder: Path, model: Any, tokenizer: Any = None) -> str:
    model.save_pretrained(folder)
    (tokenizer or byte_pairs([END], {"eos_token": END})).save_pretrained(folder)
    return str(folder)


def batch() -> dict[str, Tensor]:
    """Numbers of tokens in which each setting finds something, the end of text among them."""
    ids = torch.randint(10, 299, (8, 12), generator=torch.Generator().manual_seed(0))
    ids[:, -2], ids[::2, -1] = 299, 3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize(
    ("make", "setting", "values"),
    [
        (gpt2, "pad_token_id", (0, 3)),
        (llama, "pad_token_id", (0, 3)),
        (roberta, "pad_token_id", (1, 3)),
        (clip, "eos_token_id", (2, 3)),
        (t5, "decoder_start_token_id", (0, 3)),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_other_values_are_refused_and_equal_ones_give_the_other_parent(
    make: Callable[..., Any], setting: str, values: tuple[int, int], named: bool, tmp_path: Path
) -> None:
    a, b, other = make(1, **{setting: values[0]}), make(2, **{setting: values[0]}), make(2, **{setting: values[1]})
    parents = (
        [saved(tmp_path / name, one) for name, one in zip("abo", (a, b, other), strict=True)]
        if named
        else [a, b, other]
    )
    message = rf"look for other tokens: {setting} is {values[0]} in a and {values[1]} in b, and .+ computes by it"
    config, data = load_config(None, TO_B), batch()
    if make is t5:
        data["decoder_input_ids"] = data["input_ids"]
    with pytest.raises(FusionError, match=message):
        fuse([parents[0], parents[2]], [data], config, names=["a", "b"])
    found: Any = fuse([parents[0], parents[1]], [data], config, names=["a", "b"]).model
    assert apart(found, b, data) < 1e-3
    if make is not t5:  # whose decoder is given its tokens
        assert apart(other, b, data) > 0.1


def apart(a: Any, b: Any, data: dict[str, Tensor], others: dict[str, Tensor] | None = None) -> float:
    """The largest difference of the outputs of two models, whose numbers of tokens may be others."""
    one, other = text_outputs(a, data), text_outputs(b, others or data)
    return float((one - other).abs().max() / one.abs().max())


def test_what_only_generating_looks_for_is_told(tmp_path: Path) -> None:
    models = [
        redrawn(transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, bos_token_id=0, eos_token_id=end)), seed)
        for seed, end in ((1, 0), (2, 7))
    ]
    paths = [saved(tmp_path / name, model) for name, model in zip("ab", models, strict=True)]
    result = fuse(paths, [batch()], load_config(None, TO_B), names=["a", "b"])
    assert "eos_token_id is 0 in a and 7 in b: the fused model generates with the anchor's" in result.warnings


def test_settings_follow_their_tokens_into_another_numbering(tmp_path: Path) -> None:
    """And never to a token that the parent lacks, in whose place it reads its end of text."""
    tokenizer: Any = byte_pairs([END], {"eos_token": END})
    new = {old: number for number, old in enumerate(order(tokenizer).tolist())}

    def moved(parts: dict[str, Any]) -> None:
        parts["model"]["vocab"] = {token: new[old] for token, old in parts["model"]["vocab"].items()}

    other: Any = rebuilt(tokenizer, moved)
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["[NEW]"])
    model = gpt2(2, pad_token_id=new[9], eos_token_id=[0, new[20]])
    path = saved(tmp_path / "b", model, other)
    found: Any = load_parent(path, Vocabulary(more, len(more)))
    assert (found.config.pad_token_id, found.config.eos_token_id) == (9, [0, 20])
    ids = torch.tensor([[9, 20, 9, 9], [30, 9, 40, 50]])
    renumbered = torch.tensor([[new[one] for one in row] for row in ids.tolist()])
    assert apart(found, model, {"input_ids": ids}, {"input_ids": renumbered}) < 1e-5
    position = roberta(2, pad_token_id=next(one for one in range(1, 39) if new[one] != one))
    path = saved(tmp_path / "r", position, other)
    with pytest.raises(FusionError, match="counts positions from its token for padding"):
        load_parent(path, Vocabulary(tokenizer, len(tokenizer)))
    path = saved(tmp_path / "c", clip(2, eos_token_id=2), other)
    with pytest.raises(FusionError, match="looks for the token with the largest number"):
        load_parent(path, Vocabulary(tokenizer, len(tokenizer)))


def test_padding_that_no_parent_has_is_the_end_of_text(tmp_path: Path) -> None:
    config, models = load_config(None, {"align.solver": "emd"}), [gpt2(seed, eos_token_id=0) for seed in (1, 2)]
    paths = [saved(tmp_path / name, model) for name, model in zip("ab", models, strict=True)]
    result = fuse(paths, [batch()], config, names=["a", "b"], output=tmp_path / "fused")
    assert result.warnings[:2] == [f"{name} has no pad_token_id: texts are padded with token 0" for name in "ab"]
    kept = json.loads((tmp_path / "fused" / "model" / "config.json").read_text())
    assert kept["pad_token_id"] == 0
    known = saved(tmp_path / "known", gpt2(2, eos_token_id=0, pad_token_id=5))
    result = fuse([paths[0], known], [batch()], config, names=["a", "known"])
    assert result.warnings[0] == "a has no pad_token_id: texts are padded with token 5"
    with pytest.raises(
        FusionError, match="parent 0 has no pad_token_id, so a GPT2ForSequenceClassification classifies"
    ):
        fuse(models, [batch()], config)
    assert models[0].config.pad_token_id is None


def test_commands_pad_what_has_no_padding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [saved(tmp_path / name, gpt2(seed, eos_token_id=0)) for name, seed in (("a", 1), ("b", 2))]
    rows = [f"{line[: 20 + row % 9]},{row % 2}" for row, line in enumerate(lines(80))]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    data = ["--data.path", str(tmp_path / "rows.csv"), "--data.max_length", "16"]
    assert main(evaluate, ["--models", *paths, *data]) == 0
    assert f"texts are padded with '{END}'" in capsys.readouterr().out
    fused = str(tmp_path / "fused")
    assert main(fuse_command, ["--parents", *paths, *data, "--output", fused, "--logger", "none"]) == 0
    assert "warning: a has no pad_token_id: texts are padded with token 0" in capsys.readouterr().out
    tokenizer: Any = load_tokenizer(fused)
    model: Any = load_model(fused)
    assert (tokenizer.pad_token, model.config.pad_token_id) == (END, 0)
    quick = ["--trainer.max_epochs", "1", "--logger", "none", "--trainer.accelerator", "cpu"]
    assert main(finetune, ["--model", paths[0], "--output", str(tmp_path / "tuned"), *data, *quick]) == 0
    assert load_model(tmp_path / "tuned").config.pad_token_id == 0  # type: ignore[union-attr]
