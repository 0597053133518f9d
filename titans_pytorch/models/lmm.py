"""LMM: the long-term memory alone, without attention (Titans, section 4.3).  Letters: b batch, n tokens, d features"""

from typing import NamedTuple

from torch import Tensor

from titans_pytorch.identity import identity
from titans_pytorch.memory_state import NeuralMemState
from titans_pytorch.neural_memory import NeuralMemory

from .memory import Layer, Remember, check_memory


class LMMState(NamedTuple):
    """configuration: JSON, the layer's settings but for the memory's; a layer of other settings refuses the state."""

    memory: NeuralMemState
    configuration: str | None = None


class LMMLayer(Layer):
    """[b n d] -> [b n d]: the memory reads persistent tokens, then the sequence, and answers at every token (arXiv
    2501.00663, section 4.3).

    Args:
        dim: features of a token.
        heads: of the memory, where none is given.
        n_persistent: persistent tokens (eq. 19).
        memory: a NeuralMemory of this dim; None: `titans_memory(dim, heads=heads)`.

    Raises:
        ValueError: for an argument of the wrong type, shape or range, by name.
    """

    def __init__(self, dim: int, heads: int = 1, n_persistent: int = 0, memory: NeuralMemory | None = None):
        given = dict(locals())
        super().__init__()
        self.remember = Remember(check_memory(memory, dim, heads), n_persistent)
        self.configuration = identity(LMMLayer.__init__, given, ("memory", "heads"))

    def forward(self, x: Tensor, state: LMMState | None = None, return_surprises: bool = False):
        """Reads the tokens that follow those in the state.

        Args:
            x: tokens [b n d].
            state: what the call before returned; None where a sequence begins.
            return_surprises: also return (loss, step), each [b h n], as NeuralMemory does.

        Returns:
            (out [b n d], state), and (loss, step) if asked for. The residual is the caller's.
        """
        self._check_call(x, state, LMMState, return_surprises)
        read, _, memory, surprises = self.remember(x, None if state is None else state.memory)
        state = LMMState(memory, self.configuration)
        return (read, state, surprises) if return_surprises else (read, state)
