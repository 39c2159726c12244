"""What the commands share: one clear line for a mistake, presets, the options of models, data and Lightning.

Options are read, and mistakes in them answered, before anything is loaded that takes seconds: see `fusionpl.cli.jobs`.
"""

import argparse
import errno
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils.tqdm import disable_progress_bars
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from safetensors import SafetensorError

from fusionpl.cli.outputs import is_main_process
from fusionpl.datamodules.config import BUILT_IN
from fusionpl.errors import FusionError, reason
from fusionpl.models.folders import model_config, model_folder
from fusionpl.options import check_sections, explain, read_yaml
from fusionpl.presets import preset, presets
from fusionpl.training.config import LoggerName, TrainerConfig
from fusionpl.training.tasks import TASKS, TaskName, task_named, task_of_model

MISTAKE, INTERRUPT = 2, 130
NOT_SAID = ""  # the path of data that nobody has named
# What is wrong with where something is written, not with how.
_OF_THE_PLACE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR,
    errno.EEXIST,
}  # fmt: skip
_ELSEWHERE = "choose another folder with --output, or make room"
# What gloo and NCCL say to a process whose partner is gone.
_LOST = re.compile(r"[Cc]onnection (was )?(closed|reset)|Broken pipe|remote process exited", re.ASCII)


def main(run: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Runs a command and turns what went wrong into an exit code.

    Args:
        run: the command; takes its arguments.
        argv: the arguments, by default those of the process.

    Returns:
        0, 2 after a user's mistake (one line on stderr), 130 after Ctrl-C (one line that says how to go on, if
        the KeyboardInterrupt has a message), 143 and 129 likewise after SIGTERM, a scheduler's, and SIGHUP.
    """
    rank = os.environ.get("LOCAL_RANK", "0")
    where = "" if rank == "0" else f" (process {rank})"
    with _stopping() as signals:
        return _exit_code(run, sys.argv[1:] if argv is None else argv, where, signals)


@contextmanager
def _stopping() -> Iterator[list[int]]:
    """Lets SIGTERM and SIGHUP stop a command as Ctrl-C does; the list has those that came. What is ignored stays so:
    nohup is there to survive a SIGHUP."""
    came: list[int] = []

    def stop(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_code(run: Callable[[Sequence[str]], None], argv: Sequence[str], where: str, signals: Sequence[int]) -> int:
    try:
        run(argv)
    except FusionError as error:
        print(f"error{where}: {' '.join(str(error).split())}", file=sys.stderr)
        return MISTAKE
    except (RuntimeError, MemoryError) as error:
        if _LOST.search(str(error)):
            print(f"error{where}: another process of this run ended; what it said stands above; "
                  "run the command again, a training with --resume", file=sys.stderr)  # fmt: skip
            return MISTAKE
        if not (isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error)):
            raise
        print(f"error{where}: out of memory: {_allocation(error)}; use smaller batches, samples or images",
              file=sys.stderr)  # fmt: skip
        return MISTAKE
    except BrokenPipeError:  # `fuse.py --dry-run | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in _OF_THE_PLACE:
            raise
        place = f": {error.filename}" if error.filename else ""
        print(f"error{where}: {error.strerror}{place}; {_ELSEWHERE}", file=sys.stderr)
        return MISTAKE
    except SafetensorError as error:  # has no errno of its own
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None or int(number[1]) not in _OF_THE_PLACE:
            raise
        print(f"error{where}: {os.strerror(int(number[1]))}; {_ELSEWHERE}", file=sys.stderr)
        return MISTAKE
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):  # Lightning makes an exit of Ctrl-C
            raise
        print(_stopped(signals), file=sys.stderr)
        return 128 + signals[0] if signals else INTERRUPT
    except KeyboardInterrupt as stop:
        if is_main_process():
            print(_stopped(signals) + (f"; {stop}" if str(stop) else ""), file=sys.stderr)
        return 128 + signals[0] if signals else INTERRUPT
    return 0


def _stopped(signals: Sequence[int]) -> str:
    return f"stopped by {signal.Signals(signals[0]).name}" if signals else "interrupted"


def _allocation(error: BaseException) -> str:
    """What could not be allocated, without where in the library."""
    match = re.search(r"[Tt]ried to allocate [\d.]+ ?\w+", str(error))
    return match[0] if match else reason(error)


def parse(parser: ArgumentParser, argv: Sequence[str], default: Path) -> Namespace:
    """Parses the command line over the preset `default`, or over the file that `--config` names.

    Raises:
        FusionError: an unknown option or key (with the nearest known one), or a value of the wrong type.
    """
    return parse_options(parser, argv if configs_in(argv) else ["--config", str(default), *argv])


def parse_options(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parses a command line.

    Raises:
        FusionError: see `parse`; a section of the file that `--config` names holds no options.
    """
    for _, file in configs_in(argv):
        if Path(file).is_file():
            check_sections(read_yaml(file), parser, file)
    try:
        options = parser.parse_args(list(argv))
    except ArgumentError as error:
        raise FusionError(explain(str(error), parser)) from error
    loggers = options.get("logger") or []
    if "none" in loggers and len(loggers) > 1:
        raise FusionError(f"--logger {' '.join(loggers)}: none leaves the others out; leave none out, or them")
    return options


def configs_in(argv: Sequence[str]) -> list[tuple[int, str]]:
    """What `--config` names: the place of the word that ends with it, and the name."""
    places = []
    for at, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if option == "--config" and equals:
            places.append((at, value))
        elif option == "--config" and at + 1 < len(argv):
            places.append((at + 1, argv[at + 1]))
    return places


def with_presets(argv: Sequence[str], kind: str) -> list[str]:
    """The arguments, with the files of presets that `--config` calls by their names.

    Args:
        argv: the arguments; `--list-presets` prints the names and ends the command.
        kind: of presets, a folder of conf/.

    Raises:
        FusionError: there is no such file or preset, or it holds no settings.
    """
    if "--list-presets" in argv:
        descriptions = presets(kind)
        print(*(f"{name.ljust(max(map(len, descriptions)))}  {what}" for name, what in descriptions.items()), sep="\n")
        raise SystemExit(0)
    words = list(argv)
    for place, name in configs_in(argv):
        file = preset(kind, name)
        if not read_yaml(file):
            raise FusionError(f"{file} holds no settings; leave --config out for the default preset")
        words[place] = words[place].removesuffix(name) + str(file)
    return words


def task_of(argv: Sequence[str], default: TaskName = "image-classification") -> TaskName:
    """The task that `--task`, or else the file of `--config`, names: which options there are depends on it.

    Raises:
        FusionError: there is no such task.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--task")
    peek.add_argument("--config")
    known, _ = peek.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    name = known.task
    if name is None and known.config and Path(known.config).is_file():
        name = read_yaml(known.config).get("task")
    return default if name is None else task_named(str(name))


def parser_for(argv: Sequence[str], option: str, build: Callable[[TaskName], ArgumentParser]) -> ArgumentParser:
    """The parser of a command whose models have a task and data of their own, unless the command line names others.

    Args:
        argv: the arguments.
        option: that names the models, such as `--parents`.
        build: makes the parser for a task.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument(option, dest="models", nargs="+", default=[])
    known, _ = peek.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    origin = next((settings for settings in map(settings_in, known.models) if settings), {})
    return parser_like(argv, origin, known.models[:1], build)


def parser_like(
    argv: Sequence[str], origin: Mapping[str, Any], models: Sequence[str], build: Callable[[TaskName], ArgumentParser]
) -> ArgumentParser:
    """The parser for the task and data of a run, or for the task that a published model's class says.

    Args:
        argv: the arguments; their `--task` comes first.
        origin: the run's settings; empty where the models are no runs.
        models: one of them, or none.
        build: makes the parser for a task.

    Raises:
        FusionError: there is no such task; nothing is known of the model, and so of some of the options.
    """
    foreign, unreadable = not origin and bool(models), None
    trained: TaskName | None = task_named(origin.get("task", "image-classification"))
    if foreign:
        try:
            trained = task_of_model(model_config(model_folder(models[0], weights=False)))
        except FusionError as error:  # is raised again where it is opened, behind mistakes in options
            trained, unreadable = None, error
    task = task_of(argv, trained or "image-classification")
    parser = build(task)
    if task == trained:
        # How images are normalised is in the folders of models: another parent's may be another.
        data = {key: value for key, value in origin.get("data", {}).items() if key != "normalize"}
        parser.set_defaults({f"data.{key}": value for key, value in data.items()})
    known = parser.get_defaults(skip_validation=True).keys()
    if foreign and parser.get_default("data.path") in BUILT_IN:
        parser.set_defaults({"data.path": NOT_SAID})
    words = (word.removeprefix("--").partition("=")[0] for word in argv if word.startswith("--data."))
    if unreadable and any(word not in known for word in words):
        raise unreadable
    return parser


def check_trains(task: TaskName) -> None:
    """Raises FusionError for a task in which nothing is learned."""
    if not TASKS[task].trains:
        raise FusionError(
            "an encoder without a head has no outputs to be taught: fuse or evaluate it as it is, or put a classifier "
            "on it: finetune.py --task text-classification --data.path LABELLED_SENTENCES"
        )


def settings_in(run: str | Path) -> dict[str, Any]:
    """What a run's config.yaml holds; nothing where there is none."""
    file = Path(run) / "config.yaml"
    return read_yaml(file) if file.is_file() else {}


def add_trainer_options(parser: ArgumentParser) -> None:
    """Adds `--trainer.KEY` for the arguments of Lightning's Trainer that are a user's to choose."""
    parser.add_class_arguments(TrainerConfig, "trainer", instantiate=False)


def add_logger_option(parser: ArgumentParser, default: LoggerName = "wandb") -> None:
    """Adds `--logger`."""
    parser.add_argument("--logger", nargs="+", type=LoggerName, default=[default], help="""where figures go besides
                        metrics.csv, which is always written: wandb, tensorboard, or both; csv or none: nowhere
                        else""")  # fmt: skip


def add_reading_options(parser: ArgumentParser) -> None:
    """Adds the options that say how models are read."""
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin where there are no "
                        "safetensors, by torch.load(weights_only=True)")  # fmt: skip


def quiet() -> None:
    """Silences what libraries tell their developers; errors still show. What is loaded later sets its own levels and
    filters, so jobs call this again."""
    for name in ("lightning.pytorch", "lightning.fabric", "torch.distributed", "huggingface_hub", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning|torch|timm|transformers|datasets")
    warnings.formatwarning = lambda message, *where, **more: f"warning: {message}\n"
    if not sys.stderr.isatty():
        disable_progress_bars()


def new_parser(description: str, *, presets: bool = True) -> ArgumentParser:
    """A parser whose mistakes `parse` turns into one line; an option is its full name, never an abbreviation.

    Args:
        description: of the command.
        presets: whether it has some, see `with_presets`.
    """
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a YAML file of these options"
                        + ", or the name of one that --list-presets lists" * presets)  # fmt: skip
    return parser


def settings_of(parser: ArgumentParser, options: Namespace) -> dict[str, Any]:
    """What decides a result, as plain values: `--config` reads it back. Leaves out where the output goes."""
    result_options = options.clone()
    for key in ("config", "output", "overwrite", "resume", "push_to", "push_private"):
        result_options.pop(key, None)
    settings: dict[str, Any] = yaml.safe_load(parser.dump(result_options, skip_validation=True))
    return settings
