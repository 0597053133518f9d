"""Transformer layers: attention, norms, residual streams, positions."""
