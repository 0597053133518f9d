"""Moneta, Yaad and Memora (MIRAS, arXiv 2504.13173)."""

import torch
from torch import nn

from titans_pytorch.common.checks import positive_int, positive_number
from titans_pytorch.memory.presets import section_4_4
from titans_pytorch.memory_models import MemoryMLP, ResidualNorm
from titans_pytorch.rules.losses import HuberLoss, LpLoss
from titans_pytorch.rules.parts import PartsRule
from titans_pytorch.rules.retentions import KLSoftmax, LqNorm


def _miras(dim_head: int, segment: int, expansion_factor: float, max_step: float) -> dict:
    """What the three share: f(x) = x + LayerNorm(gelu(x W_1) W_2) (section 5.3); causal convolution over 4 tokens,
    SiLU, unit norm of queries and keys, gated output (section 5.4); gradients at the weights where a mini-batch starts.

    Chosen: rates are one number per token and head (the paper has one per channel); LayerNorm has no learned scale and
    shift; max_step, and a small forget gate at first.
    """
    return {
        **section_4_4(),
        "chunk_size": 1,
        "batch_size": positive_int(segment, "segment"),
        "model": ResidualNorm(dim_head, MemoryMLP(dim_head, 2, expansion_factor), gain=False),
        "default_step_transform_max_lr": positive_number(max_step, "max_step"),
    }


def moneta(
    dim_head: int,
    *,
    segment: int = 16,
    expansion_factor: float = 4.0,
    max_step: float = 0.5,
    p: float = 3.0,
    q: float = 4.0,
    printed: bool = False,
) -> dict:
    """A_t = alpha_t A_{t-1} - theta_t grad |f(k_t) - v_t|_p^p, W_t = sign(A_t) |A_t|^(q-1) / |A_t|_q^(q-2) (arXiv
    2504.13173, eq. 24 and section 5.2).

    p = 3 and q = 4 are the paper's. Eq. 24 prints W_t = A_t / |A_t|_q^(q-2) (printed=True), which diverges with this
    network: see `LqNorm`. Chosen: the norm is taken of each matrix and at every token (the paper's parallel form takes
    it at the end of a mini-batch); A_0 is learned, and starts where W_0 is Xavier-uniform.
    """
    retention = LqNorm(q, printed)
    keywords = _miras(dim_head, segment, expansion_factor, max_step)
    with torch.no_grad():
        for weight in keywords["model"].model.weights:
            weight.copy_(retention.sums(weight.unsqueeze(0))[0])
    return keywords | {"update_rule": PartsRule(loss_fn=LpLoss(p), retention=retention)}


def yaad(dim_head: int, *, segment: int = 16, expansion_factor: float = 4.0, max_step: float = 0.5) -> dict:
    """W_t = alpha_t W_{t-1} - theta_t grad |e_t|^2 where the norm of e_t = f(k_t) - v_t is at most delta_t, else -
    theta_t delta_t grad |e_t|_1 (arXiv 2504.13173, eq. 26).

    delta_t is the softplus of a linear map of the token (chosen; the paper says that it depends on the data).
    """
    own = {"store_memory_loss_fn": HuberLoss(), "momentum": False}
    return _miras(dim_head, segment, expansion_factor, max_step) | own


def memora(dim_head: int, *, segment: int = 16, expansion_factor: float = 4.0, max_step: float = 0.5) -> dict:
    """W_t = c softmax(alpha_t log W_{t-1} - theta_t grad |f(k_t) - v_t|^2) (arXiv 2504.13173, eq. 27).

    Chosen: the softmax over the inputs of each output, c the square root of their number, standard normal logits at
    first, the full rule at every token (the paper's parallel form takes the softmax once a mini-batch); see
    `KLSoftmax`.
    """
    keywords = _miras(dim_head, segment, expansion_factor, max_step)
    for weight in keywords["model"].model.weights:
        nn.init.normal_(weight)
    return keywords | {"update_rule": PartsRule(retention=KLSoftmax())}
