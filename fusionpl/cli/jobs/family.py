"""Drafts the family of an architecture that none describes, and puts families to the proof."""

from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from torch import Tensor, nn

from fusionpl.calibration.forward import logits
from fusionpl.cli.running import quiet
from fusionpl.errors import FusionError, reason
from fusionpl.families import draft
from fusionpl.families.binding import bind
from fusionpl.families.family import Family, parse_family, read_family
from fusionpl.families.proof import PROOF_TOLERANCE, changed_a_little, permutation_error
from fusionpl.fusion.forms import folding_error
from fusionpl.models.load import load_model

TOKENS = 12


def draft_and_prove(args: Namespace, output: Path | None) -> None:
    """Drafts the family of a model, or reads the one that the options name, and puts it to the proof.

    Args:
        args: of the command.
        output: where a draft goes; None prints it.

    Raises:
        FusionError: what is wrong with the model or the family.
    """
    quiet()
    family = read_family(args.family)
    model = load_model(args.model, allow_pickle=args.allow_pickle)
    batch = random_batch(model)
    source = str(args.family)
    if family is None:
        source = str(output or "the draft")
        text = drafted(model, batch)
        if output is None:
            print(text)
        else:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(text)
            print(f"{output}: {text.count('# guess')} guesses to look at")
        try:
            family = parse_family(text)
        except (yaml.YAMLError, FusionError) as error:
            raise FusionError(f"{source}: {error}") from error
    print(("" if output or args.family else "# ") + proof(model, family, batch, source))


def drafted(model: nn.Module, batch: Any) -> str:
    """A draft for a model.

    Raises:
        FusionError: the model does not run, or its tree is one that nothing can be guessed of.
    """
    _scores(model, batch)
    try:
        return draft(model, lambda variant: logits(variant, batch))
    except FusionError:
        raise
    except Exception as error:  # guesses about a tree that nobody has foreseen
        raise FusionError(
            f"no draft for {type(model).__name__}: {type(error).__name__} {reason(error)}; write the file by hand, see "
            "docs/families.md"
        ) from error


def proof(model: nn.Module, family: Family, batch: Any, source: str) -> str:
    """Binds a family and moves all units at random; what it shows, in one line.

    Norms and biases that nobody has trained would hide a mistake, so all weights are first changed a little.

    Raises:
        FusionError: what is wrong with the family.
    """
    try:
        binding = bind(model, family)
    except FusionError as error:
        raise FusionError(f"{source}: {error}") from error
    changed = changed_a_little(model)
    size = float(_scores(changed, batch).abs().max())
    difference = permutation_error(changed, lambda variant: logits(variant, batch), family=family)
    if not difference <= PROOF_TOLERANCE * size:
        raise FusionError(
            f"{source}: all parameters are described, but moving units at random changes outputs by {difference:.1e} "
            f"(outputs up to {size:.1f}); look at its guesses, at joins, maps and gates, and at the order of q, k and v"
        )
    change, size, what = folding_error(model, lambda variant: logits(variant, batch), family=family)
    if not change <= PROOF_TOLERANCE * size:
        raise FusionError(
            f"{source}: its units move freely, but folding {what} changes outputs by {change:.1e} "
            f"(outputs up to {size:.1f}); a norm with an empty list of readers is let alone"
        )
    return (
        f"{source} holds: {len(binding.free)} axes in {binding.depth} blocks; moving their units at random changes "
        f"outputs by {difference:.1e} (outputs up to {size:.1f})"
    )


def random_batch(model: Any) -> Any:
    """A few random images, or sentences, as the model takes them.

    Raises:
        FusionError: it takes something else.
    """
    generator = torch.Generator().manual_seed(0)
    config = getattr(model, "config", None)
    kind = getattr(model, "main_input_name", "pixel_values")
    if kind == "input_ids":
        count = 4 if getattr(config, "pad_token_id", None) is not None else 1
        rows = int(getattr(config, "vocab_size", 2))
        ids = torch.randint(min(5, rows - 1), rows, (count, TOKENS), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind != "pixel_values":
        raise FusionError(f"{type(model).__name__} takes {kind}; only images and tokens can be made up")
    cut = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    owners = (getattr(model, "patch_embed", None), "img_size"), (config, "image_size"), (model, "image_size")
    size = next((side for owner, name in owners if (side := getattr(owner, name, None))), 224)
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(4, cut.in_channels if cut else 3, height, width, generator=generator)
    return images if config is None or not hasattr(model, "config_class") else {"pixel_values": images}


def _scores(model: nn.Module, batch: Any) -> Tensor:
    try:
        with torch.inference_mode():
            return logits(model, batch)
    except Exception as error:  # whatever a model raises that wants other inputs
        raise FusionError(
            f"{type(model).__name__} gives no logits for random inputs: {type(error).__name__} {reason(error)}"
        ) from error
