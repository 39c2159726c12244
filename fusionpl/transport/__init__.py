"""Optimal transport between sets of units: ground metrics, solvers, TransportMap. Pure tensors, no model."""
