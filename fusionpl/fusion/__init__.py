"""Fusion: align parents to an anchor and average them into one model."""
