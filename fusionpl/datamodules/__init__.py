"""Data with fixed splits, among them a calibration set."""
