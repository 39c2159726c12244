"""Calibration: networks run section by section over the same batches, their activations reduced to moments."""

from fusionpl.calibration.batches import Progress, batches, no_progress, unlabelled
from fusionpl.calibration.config import CalibrationConfig, Scale
from fusionpl.calibration.cursor import CalibrationSet, Cursor, Passage, or_zeros, places_of, sum_over_ranks
from fusionpl.calibration.embeddings import Pooling, embed
from fusionpl.calibration.forward import Batch, device_named, device_of, eval_mode, has_float64, inputs_of, logits
from fusionpl.calibration.kept import GIB, Kept, Store, budget, bytes_of, free_memory
from fusionpl.calibration.moments import Key, Moments
from fusionpl.calibration.network import Network
from fusionpl.calibration.observe import Statistics, Target, Wanted, observe
from fusionpl.calibration.restacked import Restacked, Run
from fusionpl.calibration.taps import Place, captured, parameter_units, recorded
from fusionpl.calibration.tokens import select, window

__all__ = [
    "GIB",
    "Batch",
    "CalibrationConfig",
    "CalibrationSet",
    "Cursor",
    "Kept",
    "Key",
    "Moments",
    "Network",
    "Passage",
    "Place",
    "Pooling",
    "embed",
    "Progress",
    "Restacked",
    "Run",
    "Scale",
    "Statistics",
    "Store",
    "Target",
    "Wanted",
    "batches",
    "budget",
    "bytes_of",
    "captured",
    "device_named",
    "device_of",
    "eval_mode",
    "free_memory",
    "has_float64",
    "inputs_of",
    "logits",
    "no_progress",
    "parameter_units",
    "observe",
    "or_zeros",
    "places_of",
    "recorded",
    "select",
    "sum_over_ranks",
    "unlabelled",
    "window",
]
