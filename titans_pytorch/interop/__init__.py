"""Weights from other packages."""
