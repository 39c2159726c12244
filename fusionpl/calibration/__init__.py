"""Calibration: networks run section by section over the same batches, their activations reduced to moments."""
