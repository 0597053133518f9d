"""Counts the operations that a memory, attention and the transformer around them need. Pure arithmetic, no torch.

One operation is one floating-point multiplication or addition. Counted are matrix products, [m k] by [k n] being
2 m k n, and elementwise work on tensors of a weight's shape. Not counted: norms, activations, softmaxes, rotations,
residual streams, and whatever is paid per feature of a token. Causal products count the half that is not masked, and
a memory needs the operations of its cheapest form: an implementation that does more gets no credit for it.

For one weight matrix [d e] of a memory network, in one head (p tokens per chunk, o orders of momentum):

surprise   the network forward at the mini-batch start weights, 2 d e per written pair, and backward, 2 d e for all but
           the first matrix
recurrent  each chunk's weights are built: the gradient, 2 d e per pair; per chunk, 2 d e for each order of momentum and
           for the memory; a read, 2 d e per query. With spectral norm, the iteration per chunk besides.
dual       nothing is built within a window of T tokens (fast weights as attention): a read of what was carried in,
           2 d e (1 + o) per query; scores and values, 2 (d + e) for each stored pair that a query sees; memory and
           momentum at the window's end, 2 d e (1 + o) per pair and as much per window. T is a power of two of chunks,
           at most one mini-batch; the cheapest such T is taken.

A training step is three times the forward: each product has two more for the gradients of its factors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class MemoryShape:
    """The sizes of a NeuralMemory that determine its operations.

    weights: (d, e) of each matrix of one head's memory network, in the order of application.
    anchor: tokens of a mini-batch; None: all tokens.
    modulated: parameters of the memory network with a learned factor (0: none).
    """

    dim: int
    chunk: int
    weights: tuple[tuple[int, int], ...]
    heads: int = 1
    dim_head: int | None = None
    anchor: int | None = None
    kv_per_token: int = 1
    momentum_order: int = 1
    attn_pool: bool = False
    modulated: int = 0
    spectral: bool = False
    residual_mix: bool = False

    @property
    def inner(self) -> int:
        return self.heads * (self.dim_head or self.dim)


def product(m: int, k: int, n: int) -> int:
    """Count [m k] by [k n]."""
    return 2 * m * k * n


def memory_operations(shape: MemoryShape, batch: int, tokens: int) -> dict[str, int]:
    """Count forward operations of writing and reading `tokens`, in parts."""
    rows, pairs = batch * shape.heads, tokens // shape.chunk * shape.chunk * shape.kv_per_token
    chunks = tokens // shape.chunk
    surprise = sum(pairs * 2 * d * e * (1 if i == 0 else 2) for i, (d, e) in enumerate(shape.weights))
    forms = memory_forms(shape, tokens)
    spectral = chunks * sum(newton_schulz_operations(d, e) for d, e in shape.weights) if shape.spectral else 0
    return {
        "projections": _projections(shape, batch, tokens),
        "rates": _rates(shape, batch, tokens),
        "surprise": rows * surprise,
        "store and read": rows * sum(min(form.values()) for form in forms),
        "spectral norm": rows * spectral,
    }


def memory_forms(shape: MemoryShape, tokens: int) -> list[dict[str, int]]:
    """Count the operations of each exact form of writing and reading, for each weight matrix of one row and head."""
    dual = not shape.spectral
    return [
        {"recurrent": recurrent_operations(shape, d, e, tokens)}
        | ({"dual": min(dual_operations(shape, d, e, tokens, t) for t in _windows(shape, tokens))} if dual else {})
        for d, e in shape.weights
    ]


def recurrent_operations(shape: MemoryShape, d: int, e: int, tokens: int) -> int:
    chunks = tokens // shape.chunk
    pairs = chunks * shape.chunk * shape.kv_per_token
    return pairs * 2 * d * e + chunks * (1 + shape.momentum_order) * 2 * d * e + tokens * 2 * d * e


def dual_operations(shape: MemoryShape, d: int, e: int, tokens: int, window: int) -> int:
    carried = 2 * d * e * (1 + shape.momentum_order)
    total = tokens * carried
    for begin in range(0, tokens, window):
        length = min(window, tokens - begin)
        chunks = length // shape.chunk
        total += visible_pairs(length, shape.chunk) * shape.kv_per_token * 2 * (d + e)
        total += chunks * shape.chunk * shape.kv_per_token * carried + carried
    return total


def visible_pairs(tokens: int, chunk: int) -> int:
    """Sum over t < tokens of the tokens written when t is read: floor((t + 1) / chunk) * chunk."""
    chunks, rest = divmod(tokens, chunk)
    whole = chunk * chunk * (chunks - 1) * chunks // 2 + chunks * chunk
    return whole + rest * chunks * chunk


def newton_schulz_operations(d: int, e: int, steps: int = NEWTON_SCHULZ_STEPS) -> int:
    """Count operations for one matrix: the plain iteration, or the same with all products but the first and last square
    in the smaller side (one square for each polynomial, two to move the Gram matrix on, one to join the
    polynomials)."""
    small, large = min(d, e), max(d, e)
    plain = steps * (2 * product(small, large, small) + product(small, small, small))
    square = steps + 3 * (steps - 1)
    return min(plain, 2 * product(small, large, small) + square * product(small, small, small))


def attention_operations(dim: int, heads: int, dim_head: int, batch: int, tokens: int) -> int:
    """Count causal attention over all earlier tokens, with its four projections."""
    inner = heads * dim_head
    return batch * (4 * product(tokens, dim, inner) + 2 * product(1, inner, tokens * (tokens + 1) // 2))


def transformer_operations(kwargs: Mapping[str, Any], memory: MemoryShape | None, batch: int, tokens: int) -> dict:
    """Count forward operations of MemoryAsContextTransformer(**kwargs) on `tokens` ids; `memory` is the shape of each
    of its memories, None if it has none. Residual streams and the views' mixtures are not counted, their linear maps
    are."""
    dim, depth, segment = kwargs["dim"], kwargs["depth"], kwargs["segment_len"]
    longterm = kwargs.get("num_longterm_mem_tokens", 0)
    n = tokens + longterm * ((tokens - 1) // segment)
    inner = kwargs.get("heads", 8) * kwargs.get("dim_head", 64)
    width = int(dim * kwargs.get("ff_mult", 4) * 2 / 3)
    window = segment + longterm

    keys = sum(min(t, window) + 1 if kwargs.get("sliding_window_attn") else t % window + 1 for t in range(n))
    keys += n * kwargs.get("num_persist_mem_tokens", 0)
    attention = 4 * product(n, dim, inner) + 2 * product(1, inner, keys)
    layers = kwargs.get("neural_memory_layers", range(1, depth + 1)) if memory is not None else ()
    views = 0
    if kwargs.get("neural_memory_qkv_receives_diff_views"):
        views = sum(product(n, dim, 3 * (1 + 4 * (layer - 1))) for layer in layers if layer > 1)
    each = memory_operations(memory, batch, n) if layers else {}
    return {
        "attention": batch * depth * attention,
        "feed-forward": batch * depth * 3 * product(n, dim, width),
        "views": batch * views,
        "logits": batch * product(tokens, dim, kwargs["num_tokens"]),
        **{f"memory {part}": len(layers) * count for part, count in each.items()},
    }


def training_operations(forward: int) -> int:
    """Count forward and backward."""
    return 3 * forward


def _windows(shape: MemoryShape, tokens: int) -> Sequence[int]:
    most = min(tokens, shape.anchor or tokens)
    windows, length = [], shape.chunk
    while length <= most:
        windows.append(length)
        length *= 2
    return windows or [shape.chunk]


def _projections(shape: MemoryShape, batch: int, tokens: int) -> int:
    maps = 2 + 2 * shape.kv_per_token if shape.heads > 1 or shape.inner != shape.dim else 1 + 2 * shape.kv_per_token
    return batch * maps * product(tokens, shape.dim, shape.inner)


def _rates(shape: MemoryShape, batch: int, tokens: int) -> int:
    chunks = tokens // shape.chunk
    per_token = shape.heads * shape.kv_per_token + (shape.heads if shape.heads > 1 else 0)  # learning rate, read gate
    per_token += shape.dim if shape.attn_pool and shape.chunk > 1 else 0
    per_chunk = shape.heads * (1 + shape.momentum_order + shape.modulated + shape.residual_mix)
    return batch * (product(tokens, shape.dim, per_token) + product(chunks, shape.dim, per_chunk))
