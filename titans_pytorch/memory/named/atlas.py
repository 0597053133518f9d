"""OmegaNet and Atlas: surprise windows and polynomial features."""

from titans_pytorch.common.checks import positive_int, positive_number
from titans_pytorch.memory.presets import MOST_PER_SEGMENT, section_4_4
from titans_pytorch.memory_models import PolynomialMemoryMLP
from titans_pytorch.rules.optimizers import Muon
from titans_pytorch.rules.parts import PartsRule


def omeganet(
    dim_head: int,
    *,
    segment: int = 1,
    window: int = 8,
    degree: int = 2,
    depth: int = 1,
    expansion_factor: float = 4.0,
) -> dict:
    """M_t = alpha_t M_{t-1} - the sum over the last `window` tokens i of gamma_i grad |M(phi(k_i)) - v_i|^2 (OmegaNet,
    arXiv 2505.23735, eq. 9 and 10). Gradients are taken at M_{t-1}, with `segment` above 1 at the weights where a
    mini-batch of as many tokens starts (section 3.3).

    phi are monomials (`PolynomialMemoryMLP`). Causal convolution over 4 tokens, SiLU, unit norm of queries and keys,
    gated output. Chosen: gamma is the token's own learning rate for itself, and that times a learned sigmoid of the
    distance for each token before; the coefficients of phi are fixed (the paper learns them, starting there); one
    matrix, since a deep memory without residual decays to zero where steps are small (`depth` changes that); the
    window; learning rates. The largest are such that the windows of a segment of equal tokens write at most all of
    their error, in a deep memory those of `paper_memory_kwargs` over the window.
    """
    positive_int(segment, "segment"), positive_int(window, "window")
    model = PolynomialMemoryMLP(dim_head, depth, degree, expansion_factor)
    keys = 1.0 + 1.0 + 0.5 * (degree == 2)  # norm(phi(k))^2 of unit keys
    most = 1 / (2 * keys) if depth == 1 else MOST_PER_SEGMENT
    return {
        **section_4_4(),
        "chunk_size": 1,
        "batch_size": segment,
        "surprise_window": window,
        "model": model,
        "default_step_transform_max_lr": most / (segment * window) * dim_head,
        "init_adaptive_step_bias": 0.0 if depth == 1 else -2.0,
        "momentum": False,
    }


def atlas(
    dim_head: int,
    *,
    segment: int = 64,
    window: int = 8,
    degree: int = 2,
    depth: int = 2,
    expansion_factor: float = 4.0,
    max_step: float = 0.05,
) -> dict:
    """S_t = eta_t S_{t-1} + the gradient of `omeganet`, M_t = alpha_t M_{t-1} - theta_t NewtonSchulz5(S_t) (Atlas,
    arXiv 2505.23735, eq. 32 and 33).

    The settings of `omeganet`, for a deep memory, and max_step, the largest theta. An update has a norm near theta
    whatever the loss, so that none can diverge. Chosen: as in `omeganet`, with a token's own pair weighing 1 in its
    window; the mini-batch.
    """
    step = positive_number(max_step, "max_step")
    changed = {"update_rule": PartsRule(optimizer=Muon(outside=True)), "default_step_transform_max_lr": step}
    keywords = omeganet(
        dim_head, segment=segment, window=window, degree=degree, depth=depth, expansion_factor=expansion_factor
    )
    del keywords["momentum"]
    return keywords | changed
