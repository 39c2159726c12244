"""A network that is run section by section is the model, and the model is left alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusionpl.calibration.cursor import places_of
from fusionpl.calibration.forward import eval_mode, logits
from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.calibration.taps import Place, captured
from fusionpl.errors import FusionError
from fusionpl.families import canonical
from fusionpl.families.axes import Tap, section_of
from fusionpl.families.binding import bind
from fusionpl.families.canonical import without_scales
from fusionpl.families.family import STEM, TAIL
from fusionpl.models.load import load_model
from fusionpl.models.opened import open_model
from fusionpl.models.save import save_model
from tests.integration.runs import make_run
from tests.models_for_tests import FAMILIES, TEXT_MODELS, images, sentences, text_model, timm_vit

ALL = (*FAMILIES, *TEXT_MODELS)
# what changes the way through a timm ViT
VARIANTS: dict[str, dict[str, Any]] = {
    "registers": {"reg_tokens": 2},
    "pooled, no class token": {"global_pool": "avg", "class_token": False},
    "LayerScale": {"init_values": 0.5},
    "norm before the blocks": {"pre_norm": True},
    "one block": {"depth": 1},
}


def model_of(name: str, seed: int = 0, **options: Any) -> nn.Module:
    return FAMILIES[name](seed, **options) if name in FAMILIES else text_model(name, seed, **options)


def batch_of(name: str) -> dict[str, Tensor]:
    return {"pixel_values": images(5)} if name in FAMILIES else sentences(7)


def walked(network: SectionedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        hidden, calls, _ = network.enter(network.parameters(STEM), batch)
        assert len(calls) == network.binding.depth
        for section, call in zip(network.binding.blocks, calls, strict=True):
            out, *_ = network.through(section, network.parameters(section), hidden, call)
            assert out is not None
            hidden = out
        found, _ = network.leave(network.states(TAIL), batch, [hidden])
    assert found is not None
    return found


def expected_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return logits(model, batch)


def everything_of(model: nn.Module) -> list[Any]:
    """What may not change: values, which tensors they are, modes, hooks, and what is patched over methods."""
    return [
        [(name, tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()],
        [(name, id(one)) for name, one in (*model.named_parameters(), *model.named_buffers())],
        [(one.training, len(one._forward_hooks), len(one._forward_pre_hooks), "forward" in vars(one))
         for one in model.modules()],
    ]  # fmt: skip


def assert_untouched(before: list[Any], model: nn.Module) -> None:
    after = everything_of(model)
    assert after[1:] == before[1:]
    for (name, place, value), (other_name, other_place, other) in zip(before[0], after[0], strict=True):
        assert (name, place) == (other_name, other_place)
        assert torch.equal(value, other), name


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("depth", [1, 3])
def test_section_by_section_gives_the_models_logits(name: str, depth: int) -> None:
    model, batch = model_of(name, depth=depth), batch_of(name)
    before = everything_of(model)
    network = SectionedModel(model, bind(model))
    torch.testing.assert_close(walked(network, batch), expected_of(model, batch), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(network.logits(batch), expected_of(model, batch), rtol=1e-6, atol=1e-6)
    assert_untouched(before, model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_through_a_vit(variant: str) -> None:
    model, batch = timm_vit(**VARIANTS[variant]), {"pixel_values": images(5)}
    torch.testing.assert_close(
        SectionedModel(model, bind(model)).logits(batch), expected_of(model, batch), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_padding_reaches_the_blocks(name: str) -> None:
    """Without its mask a sentence would see what stands in the padding."""
    model, batch = model_of(name), batch_of(name)
    mask = batch["attention_mask"].bool()
    noise = 0 if name.startswith("roberta") else 7  # it numbers its positions by what is padding
    ids = torch.where(mask, batch["input_ids"], noise)
    found, other = (
        SectionedModel(model, bind(model)).logits({**batch, "input_ids": one}) for one in (batch["input_ids"], ids)
    )
    real = mask if found.ndim == 3 else ...
    torch.testing.assert_close(found[real], other[real], rtol=1e-5, atol=1e-5)
    everything = SectionedModel(model, bind(model)).logits({**batch, "attention_mask": torch.ones_like(mask).long()})
    assert (everything[real] - found[real]).abs().max() > 1e-3


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_sentences_without_padding(name: str) -> None:
    model, batch = model_of(name), {"input_ids": sentences(7)["input_ids"].clamp_min(1)}
    for mask in ({}, {"attention_mask": torch.ones(7, 12).long()}):
        found = SectionedModel(model, bind(model)).logits({**batch, **mask})
        torch.testing.assert_close(found, expected_of(model, {**batch, **mask}), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_what_is_seen_on_the_way_is_what_passes_in_the_model(name: str) -> None:
    model, batch = model_of(name), batch_of(name)
    binding = bind(model)
    network = SectionedModel(model, binding)
    places = {
        section: places_of(
            binding, [axis for axis, tap in binding.taps.items() if section_of(axis) == section and not _value(tap)]
        )
        for section in binding.sections
    }
    assert all(places[section] for section in binding.blocks)
    with torch.no_grad():
        with captured(model, set().union(*places.values())) as wanted:
            logits(model, batch)
        hidden, calls, found = network.enter(network.parameters(STEM), batch, places=places[STEM])
        seen = dict(found)
        for section, call in zip(binding.blocks, calls, strict=True):
            state, here = network.parameters(section), places[section]
            stopped, _, early, _ = network.through(section, state, hidden, call, here, stop=True)
            assert stopped is None
            hidden, _, found, _ = network.through(section, state, hidden, call, here)  # type: ignore[assignment]
            assert set(early) == set(found) == here
            assert all(torch.equal(early[place], found[place]) for place in here)
            seen |= found
        _, found = network.leave(network.states(TAIL), batch, [hidden], places[TAIL], stop=bool(places[TAIL]))
        seen |= found
    assert set(seen) == set(wanted)
    for place, tensor in wanted.items():
        torch.testing.assert_close(seen[place], tensor, rtol=1e-6, atol=1e-6)


def _value(tap: Tap) -> bool:
    return tap.kind == "parameter"


@pytest.mark.parametrize("name", [*FAMILIES, "bert masked-lm", "roberta classifier", "distilbert masked-lm"])
def test_a_model_on_the_meta_device_is_read_from_its_folder(name: str, tmp_path: Path) -> None:
    if name == "vit_timm":  # only models made by create_model can be saved
        batch = {"pixel_values": torch.randn(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))}
        model = load_model(make_run(tmp_path, 3))
    else:
        model, batch = model_of(name), batch_of(name)
        save_model(model, tmp_path / "model")
    folder = open_model(tmp_path)
    assert folder is not None
    assert all(parameter.is_meta for parameter in folder.module.parameters())
    assert not any(buffer.is_meta for buffer in folder.module.buffers())
    network = SectionedModel(folder.module, bind(folder.module), read=folder.read, device=torch.device("cpu"))
    torch.testing.assert_close(network.logits(batch), expected_of(model, batch), rtol=1e-6, atol=1e-6)
    assert all(parameter.is_meta for parameter in folder.module.parameters())
    for key, tensor in model.named_parameters():
        assert torch.equal(network.state()[key], tensor)
    torch.testing.assert_close(expected_of(network.whole(), batch), expected_of(model, batch), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_prepared_parameters_give_the_function_back(name: str) -> None:
    options: dict[str, Any] = {"init_values": 0.5} if name == "vit_timm" else {}
    model, batch = model_of(name, **options), batch_of(name)
    before, binding = everything_of(model), bind(model)
    for prepare in (canonical, lambda state, binding, section, _: without_scales(state, binding, section)):
        network = SectionedModel(model, binding).prepared(prepare)
        torch.testing.assert_close(walked(network, batch), expected_of(model, batch), rtol=1e-4, atol=1e-4)
    assert_untouched(before, model)


@pytest.mark.parametrize("name", ALL)
def test_other_parameters_run_in_the_modules_of_a_model(name: str) -> None:
    """The fused network has the anchor's modules and parameters of its own."""
    model, other, batch = model_of(name, 0), model_of(name, 1), batch_of(name)
    before = everything_of(model)
    network = SectionedModel(model, bind(model), read=lambda key: other.get_parameter(key).detach())
    torch.testing.assert_close(network.logits(batch), expected_of(other, batch), rtol=1e-6, atol=1e-6)
    assert_untouched(before, model)


@pytest.mark.parametrize("name", ["vit_timm", "vit_hf", "bert classifier", "distilbert masked-lm"])
def test_modes_come_back_and_dropout_is_off_inside(name: str) -> None:
    model, batch = model_of(name), batch_of(name)
    expected = expected_of(model, batch)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.train()
    block = bind(model).blocks[0]
    model.get_submodule(block).eval()
    before = everything_of(model)
    with eval_mode(model):
        torch.testing.assert_close(SectionedModel(model, bind(model)).logits(batch), expected, rtol=1e-6, atol=1e-6)
    assert_untouched(before, model)
    assert model.training
    assert not model.get_submodule(block).training


@pytest.mark.parametrize("name", ["vit_timm", "bert masked-lm"])
def test_the_model_is_left_alone_when_something_goes_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of(name).train(), batch_of(name)
    network, before = SectionedModel(model, bind(model)), everything_of(model)
    block = network.binding.blocks[0]
    places = [Place(f"{block}.{child}", "output") for child, _ in model.get_submodule(block).named_children()]
    with torch.no_grad(), eval_mode(model):
        hidden, calls, _ = network.enter(network.parameters(STEM), batch)
        wrong = [
            lambda: network.enter(network.parameters(STEM), {key: one[0] for key, one in batch.items()}),
            lambda: network.through(block, network.parameters(block), hidden[..., :3], calls[0], places),
            lambda: network.leave(network.states(TAIL), batch, [hidden[..., :3]]),
        ]
        for step in wrong:
            with pytest.raises(Exception):  # noqa: B017  # what the modules raise
                step()
    assert_untouched(before, model)


def test_what_is_patched_over_forward_stays() -> None:
    """accelerate puts its own forward on the instance."""
    model, batch = timm_vit(), {"pixel_values": images(5)}
    expected, calls = expected_of(model, batch), []
    block: Any = model.get_submodule("blocks.0")
    own = block.forward

    def patched(*args: Any, **keywords: Any) -> Any:
        calls.append(args)
        return own(*args, **keywords)

    block.forward = patched
    torch.testing.assert_close(SectionedModel(model, bind(model)).logits(batch), expected, rtol=1e-6, atol=1e-6)
    assert block.forward is patched
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["vit_timm", "vit_hf", "bert masked-lm", "roberta classifier"])
def test_half_precision_runs_in_float32_on_the_cpu_and_float64_as_it_is(name: str, dtype: torch.dtype) -> None:
    model, batch = model_of(name).to(dtype), batch_of(name)
    found = SectionedModel(model, bind(model)).logits(batch)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found, expected_of(model.to(found.dtype), batch), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["bert masked-lm", "roberta masked-lm", "distilbert masked-lm"])
def test_a_tied_decoder_is_the_stems(name: str) -> None:
    model = model_of(name)
    network = SectionedModel(model, bind(model))
    shared = set(network.parameters(STEM)) & set(network.parameters(TAIL))
    assert len(shared) == 1
    assert len(network.state()) == len(dict(model.named_parameters()))


def test_parameters_that_are_not_finite_are_named() -> None:
    model = timm_vit()
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.fc1.weight")[2, 3] = float("inf")
    network = SectionedModel(model, bind(model), "seed-1")
    network.parameters("blocks.0")
    with pytest.raises(FusionError, match=r"seed-1: tensor 'blocks\.1\.mlp\.fc1\.weight' holds NaN or infinite"):
        network.parameters("blocks.1")
