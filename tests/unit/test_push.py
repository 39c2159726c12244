from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from fusionpl.cli.jobs.push import push_run
from fusionpl.errors import FusionError
from fusionpl.models.hub import HubId
from fusionpl.models.lineage import Ancestor, lineage, parents_section
from fusionpl.models.push import check_push
from fusionpl.paths import public, public_command, public_settings
from tests import hub


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[hub.Hub]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_of-nobody")
    with hub.serving({}, monkeypatch, tmp_path / "cache") as served:
        yield served


@pytest.mark.parametrize(
    ("repo", "words"),
    [
        ("fused", "'fused' lacks whose repository it is; give org/name"),
        ("org/a/b", "'org/a/b' is no name of a repository"),
        ("org/--x", "'org/--x' is no name of a repository"),
        ("other/fused", "me writes to me, org"),
        ("org/public", "org/public is there and public; add --private false"),
    ],
)
def test_names_that_can_not_be_pushed_to_are_refused(stand_in: hub.Hub, repo: str, words: str) -> None:
    stand_in.pushed = {"org/public": hub.Pushed(private=False), "org/mine": hub.Pushed(private=True)}
    with pytest.raises(FusionError, match=words):
        check_push(repo, private=True)
    for allowed, private in (("org/mine", True), ("org/public", False), ("me/new", True)):
        check_push(allowed, private=private)
    assert "/api/repos/create" not in stand_in.requests


def test_a_push_needs_a_token_that_writes_and_a_hub(stand_in: hub.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.role = "read"
    with pytest.raises(FusionError, match="the token only reads; log in with: hf auth login"):
        check_push("org/fused", private=True)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FusionError, match="the hub can't be reached"):
        check_push("org/fused", private=True)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "none")
    with pytest.raises(FusionError, match="nobody is logged in to the hub; log in with: hf auth login"):
        check_push("org/fused", private=True)


def test_a_push_that_fails_says_how_to_push_again(stand_in: hub.Hub, tmp_path: Path) -> None:
    (tmp_path / "my run" / "model").mkdir(parents=True)
    (tmp_path / "my run" / "model" / "README.md").write_text("---\nlibrary_name: timm\n---\n\n# fused\n")
    stand_in.full = True
    with pytest.raises(FusionError, match="my run is complete; push it with: fusionpl push 'my run' --to org/fused"):
        push_run(Path("my run"), "org/fused", private=True)
    stand_in.full = False
    push_run(Path("my run"), "org/fused", private=True)
    assert b"# fused" in stand_in.pushed["org/fused"].files["README.md"]


def test_metadata_names_models_of_the_hub_and_licenses_that_are_known() -> None:
    a, b = (Ancestor(name, HubId(f"org/{name}", "c0ffee"), "mit") for name in "ab")
    local, strange = Ancestor("seed-1", None, "mit"), Ancestor("c", HubId("org/c", None), None)
    assert lineage([a, b, a], "merge") == {
        "base_model": ["org/a", "org/b"],
        "base_model_relation": "merge",
        "license": "mit",
    }
    assert lineage([local], "finetune") == {"license": "mit"}
    assert "license" not in lineage([a, strange], "merge")
    assert "unknown, so this card names none" in parents_section([a, strange])


def test_public_names_of_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "home" / "me"
    here = home / "work"
    here.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    for path, name in {
        f"{here}/runs/a": "runs/a",
        f"{home}/data/cifar": "cifar",
        "~/data/cifar": "cifar",
        "../data/cifar": "cifar",
        "runs/../runs/a": "runs/a",
        "org/name@refs/pr/1": "org/name@refs/pr/1",
        "digits": "digits",
    }.items():
        assert public(path) == name
    assert public_settings({"data": {"path": here / "x", "sizes": (1, "~/y")}, "off": None}) == {
        "data": {"path": "x", "sizes": [1, "y"]},
        "off": None,
    }
    assert (
        public_command(["--parents", f"{home}/a b", f"--output={here}/out", f"--data={{path: {home}/c, limit: 1}}"])
        == "--parents 'a b' --output=out '--data={path: c, limit: 1}'"
    )
    monkeypatch.chdir("/")
    assert public(f"{home}/a") == "a"
