"""The delta rule: one matrix, squared error, every token written at the memory just before it."""

from torch import nn

from titans_pytorch.memory_models import MemoryMLP


def zero_matrix(dim: int) -> MemoryMLP:
    """A matrix memory that starts at zero."""
    model = MemoryMLP(dim, depth=1)
    nn.init.zeros_(model.weights[0])
    return model


def deltanet(dim_head: int) -> dict:
    """M_t = M_{t-1} + beta_t k_t^T (v_t - k_t M_{t-1}), beta a sigmoid (DeltaNet, arXiv 2406.06484, eq. 3 and section
    3.4).

    Causal convolution over 4 tokens, SiLU, unit norm of queries and keys, RMSNorm of each head's read. beta norm(k)^2
    is below 1, so that no write overshoots. Chosen: M_0 is learned and starts at zero.
    """
    return {
        "chunk_size": 1,
        "batch_size": 1,
        "model": zero_matrix(dim_head),
        "mem_model_norm_add_residual": False,
        "default_step_transform_max_lr": dim_head / 2,  # times 2 / dim_head, the slope of the mean squared error
        "momentum": False,
        "forget_gate": False,
        "qkv_conv_kernel": 4,
        "activation": nn.SiLU(),
        "qk_l2norm": True,
        "post_rmsnorm": True,
    }


def gated_deltanet(dim_head: int) -> dict:
    """M_t = alpha_t M_{t-1} + beta_t k_t^T (v_t - k_t alpha_t M_{t-1}) (gated DeltaNet, arXiv 2412.06464, eq. 10).

    As `deltanet`, with the forget gate applied before the surprise (`decay_first`), and a SiLU output gate (section
    3.4). Chosen: alpha is the sigmoid of a linear map, as in the rest of this package, and starts near 1 (bias 5); the
    authors use Mamba2's exp(-a softplus(.)).
    """
    return deltanet(dim_head) | {
        "forget_gate": True,
        "decay_first": True,
        "init_decay_bias": -5.0,
        "post_rmsnorm": False,  # the gated output has it
        "output_gate": "silu",
    }
