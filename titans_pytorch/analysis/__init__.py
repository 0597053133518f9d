"""Measurements of memories while a model reads: traces, plots, overshoot, values that are not finite."""
