"""LaCT: large chunks, Muon, weights of constant norm."""

from torch import Tensor, nn
from torch.nn.functional import softplus

from titans_pytorch.common.checks import positive_int, positive_number
from titans_pytorch.memory_models import SwiGLU
from titans_pytorch.rules.losses import DotProduct
from titans_pytorch.rules.optimizers import Muon
from titans_pytorch.rules.parts import PartsRule
from titans_pytorch.rules.retentions import NormRescale


class SoftplusStep:
    """softplus(x) times a scale."""

    def __init__(self, scale: float):
        self.scale = positive_number(scale, "scale")

    def __call__(self, x: Tensor) -> Tensor:
        return softplus(x) * self.scale


def keywords(dim_head: int, *, chunk: int = 2048, expansion_factor: float = 1.0) -> dict:
    """W <- norm(W + Muon(eta S + sum over a chunk of theta_i times minus the gradient of -f(k_i) . v_i)), f a SwiGLU,
    norm back to the norms that W started with (LaCT, arXiv 2505.23884, eq. 1, 5 to 8; 2,048 tokens a chunk).

    SiLU, then unit norm of queries and keys; RMSNorm of each head's read. A token reads the weights before its chunk;
    the last one of a chunk those after it. As in the authors' code: norms over the inputs of each output. Chosen: one
    learning rate per token for all three matrices; momentum of the pooled chunk; the Newton-Schulz coefficients of
    ops/newton_schulz.py.
    """
    return {
        "chunk_size": positive_int(chunk, "chunk"),
        "batch_size": chunk,
        "model": SwiGLU(dim_head, expansion_factor),
        "mem_model_norm_add_residual": False,
        "update_rule": PartsRule(loss_fn=DotProduct(), optimizer=Muon(), retention=NormRescale()),
        "adaptive_step_transform": SoftplusStep(0.01 * dim_head),
        "forget_gate": False,
        "activation": nn.SiLU(),
        "qk_l2norm": True,
        "post_rmsnorm": True,
    }
