"""Options that several commands have."""

from jsonargparse import ArgumentParser

from fusionpl.training.config import LoggerName, TrainerConfig


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
