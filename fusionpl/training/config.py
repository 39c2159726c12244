"""Options of training."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

LoggerName = Literal["wandb", "tensorboard", "csv", "none"]
# Lightning's words for precisions, old and new.
Precision = (
    Literal[64, 32, 16]
    | Literal[
        "transformer-engine",
        "transformer-engine-float16",
        "16-true",
        "16-mixed",
        "bf16-true",
        "bf16-mixed",
        "32-true",
        "64-true",
    ]
    | Literal["64", "32", "16", "bf16"]
)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a linear warm-up and a cosine to zero.

    Args:
        lr: the largest learning rate.
        weight_decay: for weight matrices; biases and norms have none.
        warmup: share of all steps the learning rate rises in.
        label_smoothing: share of the target spread over all classes; 0 for none. Only training uses it.
    """

    lr: float = 1.2e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class TrainerConfig:
    """Customize every aspect of training via flags.

    Those arguments of Lightning's Trainer that are a user's to choose, with Lightning's words: its own signature can't
    be read without loading all of it, which takes seconds.

    Args:
        accelerator: Supports passing different accelerator types ("cpu", "gpu", "tpu", "hpu", "mps", "auto").
        strategy: Supports different training strategies with aliases. Default: `"auto"`.
        devices: The devices to use. Can be set to a positive number (int or str), a sequence of device indices (list or
            str), the value `-1` to indicate all available devices should be used, or `"auto"` for automatic selection
            based on the chosen accelerator. Default: `"auto"`.
        num_nodes: Number of GPU nodes for distributed training. Default: `1`.
        precision: Double precision (64, '64' or '64-true'), full precision (32, '32' or '32-true'), 16bit mixed
            precision (16, '16', '16-mixed') or bfloat16 mixed precision ('bf16', 'bf16-mixed'). Can be used on CPU,
            GPU, TPUs, or HPUs. Default: `'32-true'`.
        fast_dev_run: Runs n if set to `n` (int) else 1 if set to `True` batch(es) of train, val and test to find any
            bugs (ie: a sort of unit test). Default: `False`.
        max_epochs: Stop training once this number of epochs is reached. Disabled by default (None). If both max_epochs
            and max_steps are not specified, defaults to `max_epochs = 1000`. To enable infinite training, set
            `max_epochs = -1`.
        min_epochs: Force training for at least these many epochs. Disabled by default (None).
        max_steps: Stop training after this number of steps. Disabled by default (-1). If `max_steps = -1` and
            `max_epochs = None`, will default to `max_epochs = 1000`. To enable infinite training, set `max_epochs` to
            `-1`.
        min_steps: Force training for at least these number of steps. Disabled by default (`None`).
        max_time: Stop training after this amount of time has passed. Disabled by default (`None`). The time duration
            can be specified in the format DD:HH:MM:SS (days, hours, minutes seconds), as a `datetime.timedelta`, or a
            dictionary with keys that will be passed to `datetime.timedelta`.
        limit_train_batches: How much of training dataset to check (float = fraction, int = num_batches). Value is per
            device. Default: `1.0`.
        limit_val_batches: How much of validation dataset to check (float = fraction, int = num_batches). Value is per
            device. Default: `1.0`.
        limit_test_batches: How much of test dataset to check (float = fraction, int = num_batches). Value is per
            device. Default: `1.0`.
        limit_predict_batches: How much of prediction dataset to check (float = fraction, int = num_batches). Value is
            per device. Default: `1.0`.
        overfit_batches: Overfit a fraction of training/validation data (float) or a set number of batches (int).
            Default: `0.0`.
        val_check_interval: How often to check the validation set. Pass a `float` in the range [0.0, 1.0] to check after
            a fraction of the training epoch. Pass an `int` to check after a fixed number of training batches. An `int`
            value can only be higher than the number of training batches when `check_val_every_n_epoch=None`, which
            validates after every `N` training batches across epochs or during iteration-based training. Additionally,
            accepts a time-based duration as a string "DD:HH:MM:SS", a `datetime.timedelta`, or a dict of kwargs to
            `datetime.timedelta`. When time-based, validation triggers once the elapsed wall-clock time since the last
            validation exceeds the interval; the check occurs after the current batch completes, the validation loop
            runs, and the timer is reset. Default: `1.0`.
        check_val_every_n_epoch: Perform a validation loop after every `N` training epochs. If `None`, validation will
            be done solely based on the number of training batches, requiring `val_check_interval` to be an integer
            value. When used together with a time-based `val_check_interval` and `check_val_every_n_epoch` > 1,
            validation is aligned to epoch multiples: if the interval elapses before the next multiple-N epoch,
            validation runs at the start of that epoch (after the first batch) and the timer resets; if it elapses
            during a multiple-N epoch, validation runs after the current batch. For `None` or `1` cases, the time-based
            behavior of `val_check_interval` applies without additional alignment. Default: `1`.
        num_sanity_val_steps: Sanity check runs n validation batches before starting the training routine. Set it to
            `-1` to run all batches in all validation dataloaders. Default: `2`.
        log_every_n_steps: How often to log within steps. Default: `50`.
        enable_progress_bar: Whether to enable to progress bar by default. Default: `True`.
        enable_model_summary: Whether to enable model summarization by default. Default: `True`.
        accumulate_grad_batches: Accumulates gradients over k batches before stepping the optimizer. Default: 1.
        gradient_clip_val: The value at which to clip gradients. Passing `gradient_clip_val=None` disables gradient
            clipping. If using Automatic Mixed Precision (AMP), the gradients will be unscaled before. Default: `None`.
        gradient_clip_algorithm: The gradient clipping algorithm to use. Pass `gradient_clip_algorithm="value"` to clip
            by value, and `gradient_clip_algorithm="norm"` to clip by norm. By default it will be set to `"norm"`.
        deterministic: If `True`, sets whether PyTorch operations must use deterministic algorithms. Set to `"warn"` to
            use deterministic algorithms whenever possible, throwing warnings on operations that don't support
            deterministic mode. If not set, defaults to `False`. Default: `None`.
        benchmark: The value (`True` or `False`) to set `torch.backends.cudnn.benchmark` to. The value for
            `torch.backends.cudnn.benchmark` set in the current session will be used (`False` if not manually set). If
            `deterministic` is set to `True`, this will default to `False`. Override to manually set a different value.
            Default: `None`.
        inference_mode: Whether to use `torch.inference_mode` or `torch.no_grad` during evaluation
            (`validate`/`test`/`predict`).
        profiler: To profile individual steps during training and assist in identifying bottlenecks. Default: `None`.
        detect_anomaly: Enable anomaly detection for the autograd engine. Default: `False`.
        sync_batchnorm: Synchronize batch norm layers between process groups/whole world. Default: `False`.
        enable_autolog_hparams: Whether to log hyperparameters at the start of a run. Default: `True`.
    """

    accelerator: str = "auto"
    strategy: str = "auto"
    devices: list[int] | str | int = "auto"
    num_nodes: int = 1
    precision: Precision | None = None
    fast_dev_run: int | bool = False
    max_epochs: int | None = None
    min_epochs: int | None = None
    max_steps: int = -1
    min_steps: int | None = None
    max_time: str | timedelta | dict[str, int] | None = None
    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = None
    limit_test_batches: int | float | None = None
    limit_predict_batches: int | float | None = None
    overfit_batches: int | float = 0.0
    val_check_interval: int | float | str | timedelta | dict[str, int] | None = None
    check_val_every_n_epoch: int | None = 1
    num_sanity_val_steps: int | None = None
    log_every_n_steps: int | None = None
    enable_progress_bar: bool | None = None
    enable_model_summary: bool | None = None
    accumulate_grad_batches: int = 1
    gradient_clip_val: int | float | None = None
    gradient_clip_algorithm: str | None = None
    deterministic: bool | Literal["warn"] | None = None
    benchmark: bool | None = None
    inference_mode: bool = True
    profiler: str | None = None
    detect_anomaly: bool = False
    sync_batchnorm: bool = False
    enable_autolog_hparams: bool = True
