"""MAL: the memory, then sliding-window attention (Titans, eq. 29 to 31).

Letters: b batch, n tokens, d features, p persistent tokens
"""

from typing import NamedTuple

from torch import Tensor, nn

from titans_pytorch.attention import KeyValueCache
from titans_pytorch.identity import identity
from titans_pytorch.memory_state import NeuralMemState
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.norms import RMSNorm

from .attention import WindowAttention
from .memory import Layer, Remember, check_memory


class MALState(NamedTuple):
    """prefix [b p d]: what the memory answered at the persistent tokens, the same in every row.
    configuration: JSON, the layer's settings but for the memory's; a layer of other settings refuses the state."""

    memory: NeuralMemState
    attention: KeyValueCache
    prefix: Tensor
    configuration: str | None = None


class MALLayer(Layer):
    """[b n d] -> [b n d]: memory as a layer (arXiv 2501.00663, eq. 29 to 31). The memory reads persistent || x;
    attention in a sliding window over its answers, of which those at the persistent tokens are always seen.

    Args:
        dim: features of a token.
        heads: of attention, and of the memory where none is given.
        window: tokens before its own that a query sees.
        n_persistent: persistent tokens (eq. 19).
        memory: a NeuralMemory of this dim; None: `titans_memory(dim, heads=heads)`.

    Raises:
        ValueError: for an argument of the wrong type, shape or range, by name.
    """

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

    def forward(self, x: Tensor, state: MALState | None = None, return_surprises: bool = False):
        """Reads the tokens that follow those in the state.

        Args:
            x: tokens [b n d].
            state: what the call before returned; None where a sequence begins.
            return_surprises: also return (loss, step), each [b h n], as NeuralMemory does.

        Returns:
            (out [b n d], state), and (loss, step) if asked for. The residual is the caller's.
        """
        self._check_call(x, state, MALState, return_surprises)
        before, cache, prefix = (None, None, None) if state is None else (state.memory, state.attention, state.prefix)
        read, first, before, surprises = self.remember(x, before)
        prefix = first if state is None else prefix
        attended, cache = self.attention(self.norm(read), self.norm(prefix[0]), cache)
        out, state = self.to_out(attended), MALState(before, cache, prefix, self.configuration)
        return (out, state, surprises) if return_surprises else (out, state)
