"""MAL: the memory, then sliding-window attention (Titans, eq. 29 to 31).

Letters: b batch, n tokens, d features, p persistent tokens
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from titans_pytorch.common.identity import identity
from titans_pytorch.common.names import known_keywords
from titans_pytorch.decoding.steps import STEPS
from titans_pytorch.layers.attention import KeyValueCache
from titans_pytorch.layers.norms import RMSNorm
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.models.attention import WindowAttention
from titans_pytorch.models.memory import Layer, Remember, check_memory, layer_step
from titans_pytorch.neural_memory import NeuralMemory


class MALState(NamedTuple):
    """prefix [b p d]: the memory's output at the persistent tokens, the same in every row.
    configuration: JSON, the layer's settings without the memory's; a layer of other settings refuses the state."""

    memory: NeuralMemState
    attention: KeyValueCache
    prefix: Tensor
    configuration: str | None = None


@known_keywords
class MALLayer(Layer):
    """Memory as a layer, [b n d] -> [b n d] (arXiv 2501.00663, eq. 29 to 31). The memory reads persistent tokens, then
    the sequence. Sliding-window attention runs over its outputs and always sees those at the persistent tokens.

    Args:
        dim: features of a token.
        heads: heads of attention, and of the default memory.
        window: attention window, the earlier tokens that a query sees.
        n_persistent: persistent tokens (eq. 19).
        memory: a NeuralMemory of this dim; None: `titans_memory(dim, heads=heads)`.

    Raises:
        ValueError: for an argument of the wrong type, shape or range, by name.
    """

    state_type = MALState

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        window: int = 128,
        n_persistent: int = 4,
        memory: NeuralMemory | None = None,
    ):
        given = dict(locals())
        super().__init__()
        self.remember = Remember(check_memory(memory, dim, heads), n_persistent)
        self.norm = RMSNorm(dim)
        self.attention = WindowAttention(dim, heads, window)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.configuration = identity(MALLayer.__init__, given, ("memory",))

    def _run(self, x: Tensor, state: MALState | None, run: Callable) -> tuple[Tensor, MALState, tuple[Tensor, ...]]:
        before, cache = (None, None) if state is None else (state.memory, state.attention)
        read, first, before, surprises = run(self.remember, x, before)
        prefix = first if state is None else state.prefix
        attended, cache = run(self.attention, run(self.norm, read), run(self.norm, prefix[0]), cache)
        return run(self.to_out, attended), MALState(before, cache, prefix, self.configuration), surprises


STEPS[MALLayer] = layer_step
