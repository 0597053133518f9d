"""LMM: the long-term memory alone, without attention (Titans, section 4.3).  Letters: b batch, n tokens, d features"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from titans_pytorch.common.identity import identity
from titans_pytorch.common.names import known_keywords
from titans_pytorch.decoding.steps import STEPS
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.models.memory import Layer, Remember, check_memory, layer_step
from titans_pytorch.neural_memory import NeuralMemory


class LMMState(NamedTuple):
    """configuration: JSON, the layer's settings without the memory's; a layer of other settings refuses the state."""

    memory: NeuralMemState
    configuration: str | None = None


@known_keywords
class LMMLayer(Layer):
    """Memory alone, [b n d] -> [b n d]: it writes persistent tokens, then the sequence; every token queries it (arXiv
    2501.00663, section 4.3).

    Args:
        dim: features of a token.
        heads: heads of the default memory.
        n_persistent: persistent tokens (eq. 19).
        memory: a NeuralMemory of this dim; None: `titans_memory(dim, heads=heads)`.

    Raises:
        ValueError: for an argument of the wrong type, shape or range, by name.
    """

    state_type = LMMState

    def __init__(self, dim: int, heads: int = 1, n_persistent: int = 0, memory: NeuralMemory | None = None):
        given = dict(locals())
        super().__init__()
        self.remember = Remember(check_memory(memory, dim, heads), n_persistent)
        self.configuration = identity(LMMLayer.__init__, given, ("memory", "heads"))

    def _run(self, x: Tensor, state: LMMState | None, run: Callable) -> tuple[Tensor, LMMState, tuple[Tensor, ...]]:
        read, _, memory, surprises = run(self.remember, x, None if state is None else state.memory)
        return read, LMMState(memory, self.configuration), surprises


STEPS[LMMLayer] = layer_step
