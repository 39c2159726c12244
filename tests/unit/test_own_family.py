"""A family of a user's own: read from a file, used in place of the library's; every mistake in one line."""

from importlib import resources
from pathlib import Path

import pytest
import torch

from fusionpl import FusionError, fuse
from fusionpl.families.family import Family, family_of, library, parse_family, read_family
from tests.models_for_tests import images, outputs, timm_vit

VIT = (resources.files("fusionpl.families") / "library/vit_timm.yaml").read_text()


def own(folder: Path, *edits: tuple[str, str]) -> Path:
    text = VIT.replace("name: vit_timm", "name: mine").replace("timm.models.vision_transformer.", "nowhere.")
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    path = folder / "my.yaml"
    path.write_text(text)
    return path


def refused(path: Path) -> str:
    with pytest.raises(FusionError) as caught:
        read_family(path)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), "my.yaml")


def test_a_path_a_family_or_nothing(tmp_path: Path) -> None:
    family = read_family(own(tmp_path))
    assert isinstance(family, Family)
    assert family.name == "mine"
    assert read_family(family) is family
    assert read_family(None) is None


def test_there_is_no_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "my.yaml") == "there is no family file my.yaml"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sizes: {head", "sizes: {{head", "my.yaml is not YAML:"),
        ("norm: pre\n", "", "my.yaml: the family lacks the key norm"),
        ("norm: pre\n", "norm: layer\n", "my.yaml: norm: 'layer' is not pre or rms or post"),
        ("norm: pre\n", "norm: pre\nfixd: []\n", "my.yaml: the family has an unknown key fixd; did you mean 'fixed'?"),
        ("tail:\n  parameters:", "tail:\n  params:", "my.yaml: tail lacks the key parameters"),
        ("path: blocks.{l}", "path: blocks", "my.yaml: block.path has no {l}, which stands for the number of a block"),
        (
            "mlp.fc2.weight: mlp <- ffn",
            "mlp.fc2.weight: mlp <- ffn <- in",
            "my.yaml: block.parameters.mlp.fc2.weight: 'mlp <- ffn <- in': at most one arrow",
        ),
        ("attn: attn.proj,", "attn: ,", "my.yaml: block.taps.attn: 'None' is no name and no list of names"),
        ("joins: {mid: [in, attn]", "joins: {mid: in", "my.yaml: block.joins.mid: 'in' is no list of 2 names or more"),
        ("sizes: {head: blocks", "sizes: {heads: blocks", "my.yaml: sizes lacks the key head, by which units are"),
        (
            "  circuits: {qk: [q, k]}",
            "  maps: {q: pears}",
            "my.yaml: block.maps.q: 'pears' is not permutation or pairs",
        ),
        ("  circuits: {qk: [q, k]}", "  circuits: [q]", "my.yaml: block.circuits is no mapping"),
    ],
)
def test_mistakes_name_the_file_and_the_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert refused(own(tmp_path, (old, new))).startswith(message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("shared: [head]", "shared: head", "my.yaml: stacks.encoder.shared is no list"),
        ("enters: stem.out", "entres: stem.out", "my.yaml: stacks.decoder has an unknown key entres; did you mean"),
        ("path: decoder.block.{l}", "path: decoder.block", "my.yaml: stacks.decoder.block.path has no {l}"),
        ("stacks:", "stem: {parameters: {}}\nstacks:", "my.yaml: the family has an unknown key stem"),
    ],
)
def test_mistakes_in_a_stack_name_it(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (resources.files("fusionpl.families") / "library" / "t5.yaml").read_text()
    (tmp_path / "my.yaml").write_text(text.replace(old, new, 1))
    assert refused(tmp_path / "my.yaml").startswith(message)


def test_stacks_that_are_no_mapping(tmp_path: Path) -> None:
    for written in ("[]", "{}", "encoder"):
        (tmp_path / "my.yaml").write_text(
            f"{{name: a, models: [], norm: rms, sizes: {{}}, fixed: [], stacks: {written}, tail: {{parameters: {{}}}}}}"
        )
        assert refused(tmp_path / "my.yaml") == "my.yaml: stacks is no mapping of names to stem and block"


def test_a_list_and_an_empty_file(tmp_path: Path) -> None:
    for text in ("", "[1, 2]", "stem"):
        (tmp_path / "my.yaml").write_text(text)
        assert refused(tmp_path / "my.yaml").startswith("my.yaml: the family is no mapping of name, models, norm")


def test_a_line_that_is_not_yaml_is_named(tmp_path: Path) -> None:
    at = VIT[: VIT.index("sizes: ")].count("\n") + 1
    assert f"line {at}" in refused(own(tmp_path, ("sizes: {head", "sizes: {{head")))


def test_fusion_under_a_family_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parents = [timm_vit(seed) for seed in (0, 1)]
    reference = fuse(parents, [images()]).model
    path = own(tmp_path)
    monkeypatch.setattr("fusionpl.families.family.library", dict)
    with pytest.raises(FusionError, match="no family for timm"):
        family_of(parents[0])
    for family in (path, str(path), read_family(path)):
        torch.testing.assert_close(outputs(fuse(parents, [images()], family=family).model), outputs(reference))


def test_a_family_that_does_not_fit_is_refused() -> None:
    with pytest.raises(FusionError, match=r"vit_hf: the model has no config\.num_attention_heads"):
        fuse([timm_vit(0), timm_vit(1)], [images()], family=library()["vit_hf"])


def test_the_library_parses_under_the_same_checks() -> None:
    assert parse_family(VIT).name == "vit_timm"
