"""The small memory that tasks give to all arms."""

from typing import Any


def small_memory(dim: int, chunk_size: int, max_step: float, **more: Any) -> dict[str, Any]:
    """Return keywords of NeuralMemory: an MLP of two layers, mini-batches of one chunk."""
    return {
        "dim": dim,
        "dim_head": dim,
        "chunk_size": chunk_size,
        "batch_size": chunk_size,
        "qk_rmsnorm": True,
        "default_step_transform_max_lr": max_step,
        "default_model_kwargs": {"depth": 2, "expansion_factor": 2.0},
        **more,
    }
