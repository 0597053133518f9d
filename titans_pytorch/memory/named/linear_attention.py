"""Linear attention."""

from titans_pytorch.memory_models import PositiveMatrix
from titans_pytorch.rules.losses import DotProduct


def keywords(dim_head: int) -> dict:
    """M_t = M_{t-1} + phi(k_t)^T v_t, a read phi(q) M_t, phi = elu + 1 (arXiv 2006.16236, eq. 7, 18 and 20).

    It is a step of size 1 against the dot product -phi(k) M v. Chosen: RMSNorm of each head's read in place of the
    division by phi(q) . sum of phi(k) (eq. 20), which is not a read of M; M_0 is learned and starts at zero.
    """
    return {
        "chunk_size": 1,
        "model": PositiveMatrix(dim_head),
        "mem_model_norm_add_residual": False,
        "store_memory_loss_fn": DotProduct(),
        "learned_step": False,
        "default_step_transform_max_lr": float(dim_head),  # the loss is a mean over features
        "momentum": False,
        "forget_gate": False,
        "post_rmsnorm": True,
    }
