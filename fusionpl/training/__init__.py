"""Training with Lightning: the module, the loggers, and `fit`, which the commands share."""

from fusionpl.training.budget import Trained, train_for
from fusionpl.training.dashboard import log_models, log_report
from fusionpl.training.distillation import Distillation, UnlabelledData
from fusionpl.training.fit import FitResult, build_trainer, fit
from fusionpl.training.fusion_callback import OTFusion
from fusionpl.training.loggers import LoggerName, finish_loggers, make_loggers
from fusionpl.training.module import ClassificationModule, OptimConfig, shrunk
from fusionpl.training.tasks import TASKS, Task, TaskName, task_named, task_of_model
from fusionpl.training.weights_and_biases import dashboard_name, group_of, in_sweep, open_run

__all__ = [
    "TASKS",
    "Task",
    "TaskName",
    "ClassificationModule",
    "Distillation",
    "FitResult",
    "LoggerName",
    "OTFusion",
    "OptimConfig",
    "Trained",
    "UnlabelledData",
    "build_trainer",
    "dashboard_name",
    "finish_loggers",
    "fit",
    "group_of",
    "in_sweep",
    "log_models",
    "log_report",
    "make_loggers",
    "open_run",
    "shrunk",
    "task_named",
    "task_of_model",
    "train_for",
]
