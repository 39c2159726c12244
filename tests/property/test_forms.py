"""Canonical forms are the same function: of timm's variants and of every class, a model fused with itself is itself,
and one that has all the weight is what comes out; a form that is another function is refused."""

from collections.abc import Iterator
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.multiprocessing as mp
from timm.layers.mlp import GluMlp
from timm.layers.norm import RmsNorm, SimpleNorm
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForPreTraining,
    MistralConfig,
    MistralForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from fusionpl import FusionError, fuse, load_config
from fusionpl.calibration.forward import logits
from fusionpl.cli import fuse as command
from fusionpl.cli.running import main
from fusionpl.families.binding import bind
from fusionpl.families.canonical import inseparable
from fusionpl.families.family import Family, library, parse_family
from fusionpl.families.proof import PROOF_TOLERANCE, permutation_error
from fusionpl.fusion.forms import folding_error
from tests.integration.runs import make_run
from tests.models_for_tests import (
    CLASSES,
    POSITIONS,
    TEXT_MODELS,
    VOCABULARY,
    batch_for,
    hf_vit,
    images,
    outputs,
    redrawn,
    run,
    text_model,
    timm_vit,
)
from tests.property.test_newer_families import BUILD as NEWER

# Units are matched one by one, so that nothing is lost where both are alike.
EXACT = {
    "strategy": "transport", "align.solver": "emd", "align.residual": "tie", "align.qk": "shared",
    "align.heads": "matched",
}  # fmt: skip
ROTATION = {**EXACT, "align.solver": "assignment", "align.stream": "rotation", "align.qk": "separate"}
PLANTED = {**EXACT, "refit.method": "none", "weights": [0.0, 1.0], "anchor": 0}


def apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max())


# timm's ViTs

# variant -> its options, and what hinders its stream from being one with another's
TIMM: dict[str, tuple[dict[str, Any], str | None]] = {
    "RMSNorm": ({"norm_layer": RmsNorm}, None),
    "RMSNorm, no final norm": ({"norm_layer": RmsNorm, "final_norm": False}, None),
    "a norm that is neither": ({"norm_layer": SimpleNorm}, "'blocks.0.norm1' is a SimpleNorm, and not a LayerNorm as"),
    "no final norm": ({"final_norm": False}, "no norm stands before 'head', which reads the mean of its stream"),
    "maximum over tokens": ({"global_pool": "max"}, "global_pool max takes what leaves its stream unit by unit"),
    "norms behind the branches": ({"block_fn": ResPostBlock}, "'blocks.0.norm1' normalises inside the stream"),
    "one map into attention and MLP": ({"block_fn": ParallelScalingBlock, "init_values": 0.5}, None),
    "two of each": ({"block_fn": ParallelThingsBlock, "init_values": 0.5}, None),
    "norms without parameters": ({"norm_layer": partial(nn.LayerNorm, elementwise_affine=False)}, None),
}
MORE: dict[str, tuple[dict[str, Any], str | None]] = {
    "plain": ({}, None),
    "RMSNorm, LayerScale, registers": ({"norm_layer": RmsNorm, "init_values": 0.5, "reg_tokens": 2}, None),
    "RMSNorm, mean pooling": ({"norm_layer": RmsNorm, "global_pool": "avg"}, None),
    "no final norm, mean pooling": ({"final_norm": False, "global_pool": "avg"}, "no norm stands before 'head'"),
    "norm before the mean": ({"global_pool": "avg", "fc_norm": False}, None),
    "norm behind the class token": ({"fc_norm": True}, None),
    "mean and maximum": ({"global_pool": "avgmax"}, "global_pool avgmax takes what leaves its stream unit by unit"),
    "maximum of what is normed": ({"global_pool": "max", "fc_norm": False}, "global_pool max takes what leaves"),
    "no pooling": ({"global_pool": ""}, None),
    "no class token": ({"class_token": False, "global_pool": "avg"}, None),
    "prefix in the mean": ({"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 1}, None),
    "positions for patches only": ({"no_embed_class": True, "reg_tokens": 2}, None),
    "norm before the blocks": ({"pre_norm": True}, "'norm_pre' normalises inside the stream"),
    "norm inside the MLP": ({"scale_mlp_norm": True}, None),
    "norms behind the branches, RMSNorm": (
        {"block_fn": ResPostBlock, "norm_layer": RmsNorm, "global_pool": "avg"}, "'blocks.0.norm1' normalises inside"
    ),
    "one map, RMSNorm": ({"block_fn": ParallelScalingBlock, "norm_layer": RmsNorm}, None),
    "packed gate": ({"mlp_layer": GluMlp}, None),
    "no biases": ({"qkv_bias": False, "proj_bias": False}, None),
}  # fmt: skip


def of_itself(name: str, **changes: Any) -> None:
    options, hindrance = (TIMM | MORE)[name]
    first, second = timm_vit(1, **options), timm_vit(2, **options)
    own = outputs(first)
    assert permutation_error(first, outputs) < 1e-5 * float(own.abs().max())
    change, size, _ = folding_error(first, outputs)
    assert change < 1e-4 * size
    assert apart(outputs(fuse([first, first], [images()], load_config("default", EXACT)).model), own) < 1e-3
    assert (
        apart(outputs(fuse([first, second], [images()], load_config("default", PLANTED)).model), outputs(second)) < 1e-3
    )
    for asked in (ROTATION, {"strategy": "joint"}):
        config = load_config("default", asked)
        if hindrance is None:
            assert apart(outputs(fuse([first, first], [images(48)], config).model), own) < 1e-3
            continue
        with pytest.raises(FusionError) as caught:
            fuse([first, first], [images()], config)
        assert f"parent 0: {hindrance}" in str(caught.value)
        assert "; use " in str(caught.value)
    assert fuse([first, first], [images()], load_config("default")).config.strategy == (
        "transport" if hindrance else "joint"
    )


@pytest.mark.parametrize("name", TIMM)
def test_a_variant_of_timm_is_what_it_was(name: str) -> None:
    of_itself(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_variants_of_timm_are_what_they_were(name: str) -> None:
    of_itself(name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, None),
        ({"global_pool": "avg"}, None),
        ({"norm_layer": RmsNorm}, None),
        ({"final_norm": False}, "no norm stands behind its last block"),
        ({"global_pool": "max"}, "global_pool max takes"),
        ({"block_fn": ResPostBlock}, "normalises inside the stream"),
    ],
)
def test_an_encoder_of_timm(options: dict[str, Any], words: str | None) -> None:
    model = timm_vit(1, num_classes=0, **options)
    hindrance = inseparable(bind(model))
    assert hindrance is None if words is None else words in str(hindrance)
    change, size, _ = folding_error(model, outputs)
    assert change < 1e-4 * size
    found = fuse([model, model], [images()], load_config("default", EXACT))
    assert apart(outputs(found.model), outputs(model)) < 1e-3


SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": CLASSES}


@pytest.mark.parametrize("name", ["vit_pwee_patch16_reg1_gap_256", "vit_base_patch16_18x2_224"])
def test_a_parallel_model_grows_in_width(name: str) -> None:
    model = redrawn(timm.create_model(name, **SIZES), 1)
    wide = fuse([model, model], [images(48)], load_config("default", {"strategy": "joint", "width": 2})).model
    assert apart(outputs(wide), outputs(model)) < 5e-3


def entry_points() -> Iterator[tuple[str, nn.Module]]:
    """timm's models in tiny size that a family describes, one of each kind."""
    seen = set()
    for name in timm.list_models(["vit_*", "deit*", "flexivit*", "eva_*", "test_vit*", "aimv2*", "beit*"]):
        try:
            model = timm.create_model(name, **SIZES)
            binding = bind(model)
        except (TypeError, AssertionError, RuntimeError, FusionError):  # it takes no such sizes, or no family knows it
            continue
        parts = [type(one).__name__ for one in model.modules()]
        kind = tuple(dict.fromkeys(parts)), tuple(binding.owners), model.global_pool
        if kind not in seen:
            seen.add(kind)
            yield name, redrawn(model, 1)


@pytest.mark.slow
def test_timms_entry_points_are_what_they_were() -> None:
    found = dict(entry_points())
    assert len(found) > 20
    assert {"vit_base_patch16_rpn_224", "vit_pwee_patch16_reg1_gap_256", "vit_base_patch16_18x2_224"} <= set(found)
    for name, model in found.items():
        own = outputs(model)
        change, size, _ = folding_error(model, outputs)
        assert change < 1e-4 * size, name
        config = load_config("default", EXACT if inseparable(bind(model)) else {"strategy": "joint"})
        assert apart(outputs(fuse([model, model], [images(48)], config).model), own) < 1e-3, name


# every class


def _tiny(cls: Any, config: Any, seed: int, **options: Any) -> nn.Module:
    return redrawn(
        cls(config(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
            max_position_embeddings=POSITIONS, num_labels=CLASSES, pad_token_id=0, **options,
        )), seed
    )  # fmt: skip


BUILD = {
    **NEWER,
    **{name: partial(text_model, name) for name in TEXT_MODELS},
    "timm": timm_vit,
    "vit": hf_vit,
    "bert pre-training": partial(_tiny, BertForPreTraining, BertConfig),
    "mistral classifier": partial(_tiny, MistralForSequenceClassification, MistralConfig, num_key_value_heads=2),
    "qwen2 classifier": partial(_tiny, Qwen2ForSequenceClassification, Qwen2Config, num_key_value_heads=2),
}


def test_every_class_of_the_library_is_among_them() -> None:
    classes = {cls for build in BUILD.values() for cls in type(build(0)).__mro__}
    known = {f"{cls.__module__}.{cls.__qualname__}" for cls in classes}
    assert {name for family in library().values() for name in family.models} <= known


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILD)
def test_a_class_is_what_it_was(name: str) -> None:
    first, second = BUILD[name](1), BUILD[name](2)
    name = "dinov2" if name in ("timm", "vit") else name
    own, batch = run(name, first), batch_for(name, 48)
    assert apart(run(name, fuse([first, first], [batch], load_config("default", EXACT)).model), own) < 1e-3
    for evidence in ("activations", "weights"):
        config = load_config("default", {**PLANTED, "align.evidence": evidence})
        assert apart(run(name, fuse([first, second], [batch], config).model), run(name, second)) < 1e-3
    # What a ridge leaves is told apart from a form that is another function: these are off by tenths.
    limit = 5e-3
    assert apart(run(name, fuse([first, first], [batch], load_config("default")).model), own) < limit


# a form that is another function

VIT = (resources.files("fusionpl.families") / "library/vit_timm.yaml").read_text()
RIGHT, SWAPPED = "scales: {ls1: [attn.proj], ls2: [mlp.fc2]}", "scales: {ls1: [mlp.fc2], ls2: [attn.proj]}"


def wrong() -> Family:
    """Its units move freely, but each LayerScale is folded into the other branch."""
    assert VIT.count(RIGHT) == 1
    return parse_family(VIT.replace(RIGHT, SWAPPED))


@pytest.mark.parametrize(
    ("changes", "use"),
    [
        ({"strategy": "auto"}, "strategy transport"),
        (ROTATION, "align.stream transport with align.residual tie and align.solver assignment"),
        ({"strategy": "transport"}, "refit.method none"),
    ],
)
def test_a_form_that_is_another_function_is_refused(changes: dict[str, Any], use: str) -> None:
    parents = [
        redrawn(timm.create_model("vit_tiny_patch16_224", **{**SIZES, "depth": depth}, init_values=0.5), depth)
        for depth in (2, 3)
    ]
    assert permutation_error(parents[0], outputs, family=wrong()) < 1e-5 * float(outputs(parents[0]).abs().max())
    for pair in (parents, parents[::-1]):
        with pytest.raises(FusionError) as caught:
            fuse(pair, [images()], load_config("default", changes), family=wrong())
        line = str(caught.value)
        assert line.startswith("parent 0: folding ")
        assert line.endswith(f"of their size, first in section 'blocks.0'; use {use}")


def test_what_folds_nothing_is_not_run() -> None:
    parents = [timm_vit(seed, init_values=0.5) for seed in (0, 1)]
    config = load_config("default", {**EXACT, "refit.method": "none"})
    fuse(parents, [images()], config, family=wrong())


def test_commands_refuse_it_by_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(make_run(tmp_path / f"seed-{seed}", seed, init_values=1)) for seed in (1, 2)]
    for path in runs:  # as training leaves it
        model = redrawn(timm.create_model(f"local-dir:{path}/model", pretrained=True), 3)
        timm.models.save_for_hf(model, f"{path}/model", safe_serialization=True)
    own = tmp_path / "my.yaml"
    own.write_text(VIT.replace(RIGHT, SWAPPED))
    argv = ["--parents", *runs, "--family", str(own), "--output", str(tmp_path / "fused")]
    assert main(command.run, argv) != 0
    assert "seed-1: folding norms into what reads them, and scales, for the fusion" in capsys.readouterr().err
    assert not (tmp_path / "fused").exists()
    assert main(command.run, [*argv, "--check"]) != 0
    assert "seed-1: folding norms into what reads them, and scales, changes outputs by" in capsys.readouterr().err


def _fuse_on(rank: int, file: str, count: int, found: Any) -> None:
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    parents = [timm_vit(seed, init_values=0.5) for seed in (0, 1)]
    try:
        fuse(parents, [images(count)], load_config("default", {"calibration.batch_size": 8}), family=wrong())
    except FusionError as error:
        found[rank] = str(error)


@pytest.mark.slow
@pytest.mark.parametrize("count", [8, 24])
def test_all_ranks_refuse_it_alike(count: int, tmp_path: Path) -> None:
    """Of one batch the second rank has nothing."""
    with mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(_fuse_on, (str(tmp_path / "store"), count, found), nprocs=2)
        lines = dict(found)
    assert lines[0] == lines[1]
    assert "first in section 'blocks.0'" in lines[0]


def test_a_form_is_held_against_what_is_run_in_half_precision() -> None:
    """The model's own rounding is no departure."""
    parents = [timm_vit(seed, init_values=0.5).bfloat16() for seed in (0, 1)]
    assert fuse(parents, [images()], load_config("default")).config.strategy == "joint"
    assert float((logits(parents[0], images()) - logits(parents[0].float(), images())).abs().max()) > PROOF_TOLERANCE
