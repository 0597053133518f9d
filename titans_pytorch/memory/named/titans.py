"""The memory of Titans."""

from titans_pytorch.memory.presets import paper_memory_kwargs


def keywords(
    dim_head: int,
    *,
    segment: int = 64,
    depth: int = 2,
    expansion_factor: float = 4.0,
    max_step: float | None = None,
) -> dict:
    """S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2, M_t = (1 - alpha_t) M_{t-1} + S_t (Titans, arXiv 2501.00663,
    eq. 8 to 18): `paper_memory_kwargs`, which says what was chosen."""
    return paper_memory_kwargs(dim_head, segment, depth=depth, expansion_factor=expansion_factor, max_step=max_step)
