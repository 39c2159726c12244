"""What an installed package can do, away from the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import fusionpl
from fusionpl.cli.main import COMMANDS, run
from fusionpl.errors import FusionError
from fusionpl.presets import CONF
from tests.integration.runs import make_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources: building leaves things beside them."""
    source = tmp_path_factory.mktemp("source")
    for name in ("fusionpl", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt"):
        shutil.copy(ROOT / name, source)
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(source / "dist"), str(source)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The console command in an environment of its own, which borrows the libraries of this one."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin/python"
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    (Path(own) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--python", str(python), str(wheel)]
    subprocess.run(pip, check=True)
    return home / "bin/fusionpl"


def spoken(command: Path, *words: str, place: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([command, *words], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_installed_package_fuses_from_an_empty_folder(command: Path, tmp_path: Path) -> None:
    assert spoken(command, "--version", place=tmp_path) == f"fusionpl {fusionpl.__version__}\n"
    parents = [str(make_run(tmp_path / f"seed-{seed}", seed)) for seed in range(2)]
    words = ("fuse", "--parents", *parents, "--output", "fused", "--config", "transport", "--logger", "none")
    assert "fused: model/, report/report.html" in spoken(command, *words, place=tmp_path)
    assert (tmp_path / "fused/model/model.safetensors").is_file()


def test_the_wheel_has_every_package_and_preset(wheel: Path) -> None:
    names = set(subprocess.run([sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True,
                               check=True).stdout.split())  # fmt: skip
    inside = {f"fusionpl/{path.relative_to(ROOT / 'fusionpl')}" for path in (ROOT / "fusionpl").rglob("*")
              if path.suffix in (".py", ".html", ".yaml", ".typed")}  # fmt: skip
    inside |= {f"fusionpl/conf/{path.relative_to(CONF)}" for path in CONF.rglob("*.yaml")}
    assert inside <= names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)


def test_presets_are_listed_with_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["fuse", "--list-presets"])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == ["default", "joint", "paper", "transport", "wide"]
    assert all(len(line.split()) > 5 for line in listed)


def test_every_command_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    run([])
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            run([name, "--help"])
        assert stop.value.code == 0
    assert capsys.readouterr().out.count("usage: ") == len(COMMANDS)
    with pytest.raises(FusionError, match="there is no command 'fues'; did you mean 'fuse'"):
        run(["fues"])


def test_a_shell_completes_commands_options_and_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out)

    def completed(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in words)
        asked = f"source ./script; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; COMP_TYPE=9; "
        asked += '"$(complete -p fusionpl | sed "s/.*-F \\([^ ]*\\).*/\\1/")"; printf "%s\\n" "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("fusionpl", "f") == ["fuse", "finetune", "family"]
    assert completed("fusionpl", "fuse", "--align.res") == ["--align.residual"]
    assert completed("fusionpl", "fuse", "--align.residual", "t") == ["tie"]
    with pytest.raises(FusionError, match=r"shell.*'bsh'.*bash"):
        run(["completion", "bsh"])
