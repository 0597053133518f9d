"""MAG: sliding-window attention, gated by the memory (Titans, eq. 26 to 28).  Letters: b batch, n tokens, d features"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from titans_pytorch.common.checks import positive_int
from titans_pytorch.common.identity import identity
from titans_pytorch.common.names import known_keywords
from titans_pytorch.decoding.steps import STEPS
from titans_pytorch.layers.attention import KeyValueCache
from titans_pytorch.layers.norms import RMSNorm
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.models.attention import WindowAttention
from titans_pytorch.models.gates import Gate
from titans_pytorch.models.memory import Layer, Remember, check_memory, layer_step
from titans_pytorch.neural_memory import NeuralMemory


class MAGState(NamedTuple):
    """configuration: JSON, the layer's settings without the memory's; a layer of other settings refuses the state."""

    memory: NeuralMemState
    attention: KeyValueCache
    configuration: str | None = None


@known_keywords
class MAGLayer(Layer):
    """Memory as a gate, [b n d] -> [b n d] (arXiv 2501.00663, eq. 26 to 28). The sequence is preceded by persistent
    tokens. Sliding-window attention, which always sees the persistent tokens, and the memory both read it; a gate
    combines their outputs.

    Args:
        dim: features of a token.
        heads: heads of attention, and of the default memory.
        window: attention window, the earlier tokens that a query sees.
        n_persistent: persistent tokens (eq. 19).
        gate: "normalised" (the paper's), "silu", "sigmoid" or "convex"; see `Gate`.
        memory: a NeuralMemory of this dim; None: `titans_memory(dim, heads=heads)`.
        init_gate_bias: initial bias of the convex gate (None: 0); attention's share starts about its sigmoid.

    Raises:
        ValueError: for an argument of the wrong type, shape or range, by name.
    """

    state_type = MAGState

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        window: int = 128,
        n_persistent: int = 4,
        gate: str = "normalised",
        memory: NeuralMemory | None = None,
        init_gate_bias: float | None = None,
    ):
        given = dict(locals())
        super().__init__()
        self.norm = RMSNorm(positive_int(dim, "dim"))
        self.attention = WindowAttention(dim, heads, window)
        self.remember = Remember(check_memory(memory, dim, heads), n_persistent)
        self.gate = Gate(dim, gate, init_gate_bias)
        self.configuration = identity(MAGLayer.__init__, given, ("memory", "init_gate_bias"))

    def _run(self, x: Tensor, state: MAGState | None, run: Callable) -> tuple[Tensor, MAGState, tuple[Tensor, ...]]:
        before, cache = (None, None) if state is None else (state.memory, state.attention)
        x = run(self.norm, x)
        attended, cache = run(self.attention, x, self.remember.persistent(), cache)
        read, _, before, surprises = run(self.remember, x, before)
        return run(self.gate, attended, read, x), MAGState(before, cache, self.configuration), surprises


STEPS[MAGLayer] = layer_step
