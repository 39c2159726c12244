"""Calibration: activations of all parents on the same batches, reduced to streaming moments."""

from fusionpl.calibration.calibrate import Key, Progress, batches, calibrate, no_progress
from fusionpl.calibration.config import CalibrationConfig, Scale
from fusionpl.calibration.forward import Batch, device_of, eval_mode, has_float64, inputs_of, logits
from fusionpl.calibration.moments import Moments
from fusionpl.calibration.taps import parameter_units, recorded

__all__ = [
    "Batch",
    "CalibrationConfig",
    "Key",
    "Moments",
    "Progress",
    "Scale",
    "batches",
    "calibrate",
    "device_of",
    "eval_mode",
    "has_float64",
    "inputs_of",
    "logits",
    "no_progress",
    "parameter_units",
    "recorded",
]
