"""MAG: sliding-window attention, gated by the memory (Titans, eq. 26 to 28).  Letters: b batch, n tokens, d features"""

from typing import NamedTuple

from torch import Tensor

from titans_pytorch.attention import KeyValueCache
from titans_pytorch.checks import positive_int
from titans_pytorch.identity import identity
from titans_pytorch.memory_state import NeuralMemState
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.norms import RMSNorm

from .attention import WindowAttention
from .gates import Gate
from .memory import Layer, Remember, check_memory


class MAGState(NamedTuple):
    """configuration: JSON, the layer's settings but for the memory's; a layer of other settings refuses the state."""

    memory: NeuralMemState
    attention: KeyValueCache
    configuration: str | None = None


class MAGLayer(Layer):
    """[b n d] -> [b n d]: memory as a gate (arXiv 2501.00663, eq. 26 to 28). With x~ = persistent || x: attention over
    x~ in a sliding window from which the persistent tokens are always seen, the memory reads x~, and a gate joins the
    two.

    Args:
        dim: features of a token.
        heads: of attention, and of the memory where none is given.
        window: tokens before its own that a query sees.
        n_persistent: persistent tokens (eq. 19).
        gate: "normalised" (the paper's), "silu" or "sigmoid"; see `Gate`.
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
        gate: str = "normalised",
        memory: NeuralMemory | None = None,
    ):
        given = dict(locals())
        super().__init__()
        self.norm = RMSNorm(positive_int(dim, "dim"))
        self.attention = WindowAttention(dim, heads, window)
        self.remember = Remember(check_memory(memory, dim, heads), n_persistent)
        self.gate = Gate(dim, gate)
        self.configuration = identity(MAGLayer.__init__, given, ("memory",))

    def forward(self, x: Tensor, state: MAGState | None = None, return_surprises: bool = False):
        """Reads the tokens that follow those in the state.

        Args:
            x: tokens [b n d].
            state: what the call before returned; None where a sequence begins.
            return_surprises: also return (loss, step), each [b h n], as NeuralMemory does.

        Returns:
            (out [b n d], state), and (loss, step) if asked for. The residual is the caller's.
        """
        self._check_call(x, state, MAGState, return_surprises)
        before, cache = (None, None) if state is None else (state.memory, state.attention)
        x = self.norm(x)
        attended, cache = self.attention(x, self.remember.persistent(), cache)
        read, _, before, surprises = self.remember(x, before)
        out, state = self.gate(attended, read), MAGState(before, cache, self.configuration)
        return (out, state, surprises) if return_surprises else (out, state)
