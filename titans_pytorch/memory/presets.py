"""Memories by name, as keywords of NeuralMemory: the one of the Titans paper, and the exact rule of a matrix."""

from torch import nn

from titans_pytorch.common.checks import positive_int, positive_number, wrong

MOST_PER_SEGMENT = 4.0  # largest sum of the learning rates of one segment


def paper_memory_kwargs(
    dim_head: int,
    segment: int = 64,
    *,
    depth: int = 2,
    expansion_factor: float = 4.0,
    max_step: float | None = None,
    **changes,
) -> dict:
    """Return the keywords of the memory of Titans (arXiv 2501.00663).

    They are used as `NeuralMemory(dim, **paper_memory_kwargs(dim_head))`.

    - Learning rate theta, momentum eta and forget gate alpha of each token (eq. 13 and 14): chunk_size 1.
    - Gradients at the fast weights at the start of each `segment` tokens (eq. 16): batch_size.
    - A plain MLP of `depth` layers as memory network, the loss |M(k) - v|^2 (eq. 12). Ours is the mean over features;
      learning rates are multiplied by dim_head, which is equivalent.
    - Causal convolution over 4 tokens, SiLU, unit norm of queries and keys, normalised and gated output (section 4.4).

    The paper gives neither kernel nor initial values. With ours a memory can be trained and stays finite: the forget
    gate starts at 0.007, learning rates at an eighth of `max_step`. The updates of a segment all start from the same
    fast weights and add up, so the largest learning rate has to shrink as segments grow. With learning rates near 1
    over 64 tokens a constant sequence diverges.

    Args:
        dim_head: features per head.
        segment: C, tokens of a mini-batch.
        depth, expansion_factor: arguments of MemoryMLP.
        max_step: the largest theta of the paper's loss; default 4 / segment.
        changes: any keywords of NeuralMemory, in place of these or beside them.

    Raises:
        ValueError: for an argument of the wrong type, shape or range, by name.
    """
    positive_int(dim_head, "dim_head")
    positive_int(segment, "segment")
    positive_int(depth, "depth"), positive_number(expansion_factor, "expansion_factor")
    step = MOST_PER_SEGMENT / segment if max_step is None else positive_number(max_step, "max_step")
    return {
        "chunk_size": 1,
        "batch_size": segment,
        "dim_head": dim_head,
        "default_model_kwargs": {"depth": depth, "expansion_factor": expansion_factor},
        "default_step_transform_max_lr": step * dim_head,
        **section_4_4(),
    } | changes


def exact_memory_kwargs(dim_head: int, *, max_step: float = 1.0, **changes) -> dict:
    """Return the keywords of a memory of one matrix whose steps cannot overshoot: `NeuralMemory.exact(dim)`.

    M_t = (1 - alpha_t) M_{t-1} + c_t k_t^T (v_t - k_t M_{t-1}): every token is written at the fast weights just before
    it (Titans, arXiv 2501.00663, eq. 8 and 13 of a memory of one matrix; the delta rule of arXiv 2406.06484 with a
    forget gate). Keys have unit norm, and c_t, the share of its error that a token writes, is at most `max_step`: no
    write overshoots, and the fast weights stay finite for every text (docs/stability.md). The engine writes many
    tokens in one triangular solve (docs/fast_path.md). Convolutions, activation, norms, gates and first rates are those
    of `paper_memory_kwargs`: at first a token writes an eighth of `max_step`.

    Args:
        dim_head: features per head.
        max_step: the largest share c, in (0, 1]; of several keys and values of a token, their sum.
        changes: any keywords of NeuralMemory, in place of these or beside them. The bound holds without momentum,
            without a mini-batch of several tokens, and for learning rates and norms as they are here.

    Raises:
        ValueError: for an argument of the wrong type, shape or range, by name.
    """
    positive_int(dim_head, "dim_head")
    if positive_number(max_step, "max_step") > 1:
        raise wrong("max_step", max_step, "at most 1, the whole error")
    pairs = positive_int(changes.get("num_kv_per_token", 1), "num_kv_per_token")
    return {
        "chunk_size": 1,
        "batch_size": 1,
        "dim_head": dim_head,
        "default_model_kwargs": {"depth": 1},
        "momentum": False,
        "default_step_transform_max_lr": max_step * dim_head / 2 / pairs,
        **section_4_4(),
    } | changes


def section_4_4() -> dict:
    """Return what these and other presets share: no wrapper, first rates, convolutions, norms and gates (Titans,
    section 4.4)."""
    return {
        "mem_model_norm_add_residual": False,
        "init_adaptive_step_bias": -2.0,
        "init_decay_bias": -5.0,
        "qkv_conv_kernel": 4,
        "activation": nn.SiLU(),
        "qk_l2norm": True,
        "output_gate": "silu",
    }
