"""Every command that README and docs name is one: its own parser takes it, and its block says what it needs."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from jsonargparse import Namespace

from fusionpl.cli import finetune, fusing, sweep, train
from fusionpl.cli.alternatives import compared
from fusionpl.cli.completion import PARSERS
from fusionpl.cli.own_data import one_path
from fusionpl.cli.parsing import parse, parse_options, with_presets
from fusionpl.cli.tasks import task_of
from fusionpl.fusion.config import load_config
from fusionpl.training.tasks import TaskName

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- needs: (\w+) -->\n)?```(\w*)\n(.*?)```", re.DOTALL)
OURS = re.compile(r"(?:python (?:\w+\.py|-m (?:fusionpl|benchmarks))|fusionpl|make) ", re.ASCII)
PRESETS = {"train": train.PRESET, "finetune": finetune.PRESET, "fuse": fusing.PRESET, "sweep": fusing.PRESET,
           "check": fusing.PRESET}  # fmt: skip
OF_A_SERVICE = ("hf", "wandb")
AT_HAND = re.compile(r"digits|pydoc|(\.\.|data)/.+")  # data that need no network
OTHERS = {"--logdir", "--render", "--scale", "--trainer.KEY"}


def commands() -> Iterator[tuple[str, str, str]]:
    """Page, command line, and what its block says that it needs."""
    for page in PAGES:
        for needs, language, block in BLOCK.findall(page.read_text()):
            lines = block.replace("\\\n", " ").splitlines()
            if language == "bash":
                yield from ((str(page.relative_to(ROOT)), line, needs) for line in lines if line)
            else:
                assert not any(map(OURS.match, lines)), f"{page}: commands stand in a block of bash"


def subcommand(words: list[str]) -> list[str]:
    """`python train.py`, `python -m fusionpl.cli.sweep` and the like as words of `fusionpl`."""
    match words:
        case ["fusionpl", *rest]:
            return rest
        case ["python", "-m", module, *rest] if module.startswith("fusionpl.cli."):
            return [module.rpartition(".")[2], *rest]
        case ["python", script, *rest] if (ROOT / script).is_file():
            return [script.removesuffix(".py"), *rest]
    raise AssertionError(f"nobody knows how to check {words}")


def parsed(name: str, *words: str) -> Namespace:
    """What the command's own parser makes of it; values that can't go together are refused."""
    if name not in PRESETS:
        return parse_options(PARSERS[name](), words)
    preset = PRESETS[name]
    argv = with_presets(words, preset.parent.name)
    parser = PARSERS[name](task_of(argv))
    args = parse(parser, one_path(argv)[0], preset)
    chosen = parser.instantiate(args)
    if preset == fusing.PRESET:
        fusing.fuse_config(chosen)
        compared(args.compare)
    for cell in sweep.grid(args.sweep) if name == "sweep" else []:
        load_config(None, cell)
    return args


def needed(args: Namespace) -> str:
    """What a command can't do without."""
    devices = args.get("trainer.devices", "auto")
    if devices not in ("auto", 1) and args["trainer.accelerator"] != "cpu":
        return "gpu"
    path = args.get("data.path", "digits")
    return "" if AT_HAND.fullmatch(path) and not args.get("push_to") and not args.get("to") else "network"


@pytest.mark.parametrize(("page", "line", "needs"), commands())
def test_a_command_is_one_and_its_block_says_what_it_needs(page: str, line: str, needs: str) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] in OF_A_SERVICE:
        assert needs == "network"
    elif "--print_config" in words:
        with pytest.raises(SystemExit, match="0"):
            parsed(*subcommand(words))
    else:
        found = needed(parsed(*subcommand(words)))
        assert found in ("", needs), f"{page}: above this block, <!-- needs: {found} -->"


def test_an_option_that_the_text_names_exists() -> None:
    parsers = [build() for build in PARSERS.values()] + [train.build_parser(task) for task in get_args(TaskName)]
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    for page in PAGES:
        named = set(re.findall(r"`[^`\n]*?(--[a-z][\w.-]*)", page.read_text()))
        assert not named - known - OTHERS, page
