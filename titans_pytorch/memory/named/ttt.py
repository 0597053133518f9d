"""TTT layers."""

from titans_pytorch.common.checks import positive_int
from titans_pytorch.memory_models import MemoryMLP, ResidualNorm


def _ttt(dim_head: int, model: MemoryMLP, segment: int, base_rate: float) -> dict:
    return {
        "chunk_size": 1,
        "batch_size": positive_int(segment, "segment"),
        "model": ResidualNorm(dim_head, model, gain=False),
        "mem_model_norm_add_residual": False,
        "default_step_transform_max_lr": base_rate / 2,
        "momentum": False,
        "forget_gate": False,
        "post_rmsnorm": True,
    }


def ttt_linear(dim_head: int, *, segment: int = 16) -> dict:
    """W_t = W_{t-1} - theta_t grad |f(k_t) - v_t|^2 at the weights where a mini-batch of `segment` tokens starts, f(x)
    = x + LayerNorm(x W), theta a sigmoid (TTT-Linear, arXiv 2407.04620, eq. 6, 7 and section 2.7).

    As in the authors' code, theta is the paper's divided by dim_head, and the loss carries 1/2. Chosen: as in the
    paper, steps of a mini-batch add up (the code divides those of its t-th token by t); LayerNorm has no learned scale
    and shift; no rotary positions, which belong to the model around it.
    """
    return _ttt(dim_head, MemoryMLP(dim_head, depth=1), segment, 1.0)


def ttt_mlp(dim_head: int, *, segment: int = 16, expansion_factor: float = 4.0) -> dict:
    """The same with a two-layer MLP, gelu between, and a tenth of the learning rate (TTT-MLP, arXiv 2407.04620, eq. 6,
    7 and section 2.7)."""
    return _ttt(dim_head, MemoryMLP(dim_head, 2, expansion_factor), segment, 0.1)
