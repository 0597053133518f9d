"""The paper's memory, and the base of the layers that use it.

Letters: b batch, n tokens, d features, h heads, p persistent tokens
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from titans_pytorch.common.checks import (
    Words,
    check_flags,
    check_tokens,
    flags,
    one_of,
    positive_int,
    positive_number,
    wrong,
)
from titans_pytorch.common.identity import check_identity
from titans_pytorch.decoding.steps import STEPS, call, step
from titans_pytorch.decoding.token_memory import read_last
from titans_pytorch.layers.attention import count
from titans_pytorch.memory.presets import paper_memory_kwargs
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.memory.unused import with_unused
from titans_pytorch.memory_models import MemoryMLP
from titans_pytorch.models.initial import MEMORY_INITS, fill
from titans_pytorch.neural_memory import NeuralMemory

NEVER = -100.0  # the sigmoid of this is 0 beside 1 in every precision


def titans_memory(
    dim: int,
    *,
    heads: int = 1,
    depth: int = 2,
    hidden: int | None = None,
    chunk_size: int = 64,
    momentum: bool = True,
    decay: bool = True,
    max_step: float = 0.1,
    conv_kernel: int = 4,
    qk_norm: str = "l2",
    norm: bool = False,
    init: str = "xavier",
    init_std: float = 0.02,
    init_scale: float = 1.0,
    surprise_threshold: float | None = None,
    **options,
) -> NeuralMemory:
    """Make `NeuralMemory.paper` with the settings of a ModelConfig: learning rate, momentum and forget gate per token
    (arXiv 2501.00663, eq. 13 and 14); a mini-batch is `chunk_size` tokens (eq. 16); convolution, SiLU and norm on
    queries and keys; a normalised and gated output (section 4.4).

    Args:
        dim: features of a token.
        heads: memories side by side, of dim / heads features.
        depth: matrices of the memory network.
        hidden: its hidden features (4 * dim / heads).
        chunk_size: tokens of a mini-batch, whose gradients are taken at the same fast weights.
        momentum: carry earlier surprise on.
        decay: use a forget gate.
        max_step: largest learning rate, for an inner loss that is the mean over features.
        conv_kernel: tokens that the convolution sees; 0 or 1 for no convolution.
        qk_norm: "l2", "rms" or "none".
        norm: wrap the memory network in a LayerNorm and a residual (mem_model_norm_add_residual). The paper does
            neither. Where the fast weights shrink, the LayerNorm divides by almost nothing and rounding errors grow.
        init: initial fast weights, "xavier", "normal" or "orthogonal".
        init_std: standard deviation of normal ones.
        init_scale: factor of the initial fast weights.
        surprise_threshold: a token with a smaller inner loss is not written.
        options: further keywords of NeuralMemory. init_decay_bias is -6 by default: the forget gate starts at 0.0025.

    Raises:
        ValueError: for an argument of the wrong type, shape or range, by name.
    """
    check_flags(titans_memory, locals())
    one_of(init, MEMORY_INITS, "init")
    positive_int(dim, "dim"), positive_int(heads, "heads")
    positive_number(init_scale, "init_scale"), positive_number(init_std, "init_std")
    positive_int(chunk_size, "chunk_size"), positive_number(max_step, "max_step"), count(conv_kernel, "conv_kernel")
    if dim % heads:
        raise wrong("heads", heads, f"a divisor of dim = {dim}")
    if qk_norm not in ("l2", "rms", "none"):
        raise wrong("qk_norm", qk_norm, '"l2", "rms" or "none"')
    head = dim // heads
    hidden = 4 * head if hidden is None else positive_int(hidden, "hidden")
    network = MemoryMLP(head, depth, expansion_factor=(hidden + 0.5) / head)
    with torch.no_grad():
        for weight in network.parameters():
            weight if init == "xavier" else fill(weight, init, init_std)
            weight.mul_(init_scale)
    changes: dict[str, Any] = {
        "heads": heads,
        "model": network,
        "momentum": momentum,
        "default_step_transform_max_lr": max_step,
        "init_adaptive_step_bias": None,
        "init_decay_bias": -6.0,
        "qkv_conv_kernel": conv_kernel if conv_kernel > 1 else None,
        "qk_l2norm": qk_norm == "l2",
        "qk_rmsnorm": qk_norm == "rms",
        "mem_model_norm_add_residual": norm,
        "surprise_threshold": surprise_threshold,
    }
    changes |= options if decay else {**options, "init_decay_bias": NEVER}
    memory = NeuralMemory(dim, **paper_memory_kwargs(head, chunk_size, **changes))
    if not decay:
        freeze(memory.rates.to_decay_factor)
    return memory


def freeze(rate: nn.Module | None) -> None:
    """Keep the map of a rate, which starts at `NEVER`, from training."""
    assert rate is not None
    rate.requires_grad_(False)


def check_memory(memory: NeuralMemory | None, dim: int, heads: int) -> NeuralMemory:
    """Return a layer's memory, the given one or the paper's. It must map [b n d] to [b n d]."""
    if memory is None:
        return titans_memory(dim, heads=heads)
    if not isinstance(memory, NeuralMemory):
        raise wrong("memory", Words(type(memory).__name__), "a NeuralMemory, or None for the paper's")
    if memory.dim != dim or memory.diff_views or memory.accept_weight_residual or not memory.tokenwise:
        takes = f"one of dim = {dim}, without diff views or weight residual, whose model is tokenwise"
        raise wrong("memory", Words(f"a NeuralMemory of dim {memory.dim}"), takes)
    return memory


class LayerState(Protocol):
    """What a layer carries. configuration: JSON, the settings of the layer that made it."""

    @property
    def configuration(self) -> str | None: ...


class Layer(nn.Module):
    """Base of MACLayer, MAGLayer, MALLayer and LMMLayer. A subclass defines `_run`."""

    configuration: str
    remember: "Remember"
    state_type: type[LayerState]

    def forward(self, x: Tensor, state: Any = None, return_surprises: bool = False):
        """Read the tokens that follow those in the state.

        Args:
            x: tokens [b n d].
            state: the state that the call before returned; None where a sequence begins.
            return_surprises: also return (inner loss, learning rate), each [b h n], as NeuralMemory does.

        Returns:
            (out [b n d], state), and (inner loss, learning rate) if asked for. The caller adds the residual.

        Raises:
            ValueError: for tokens of another shape or dtype, and for a state of another layer.
        """
        flags(return_surprises=return_surprises)
        self._check_call(x, state)
        out, state, surprises = self._run(x, state, call)
        return (out, state, surprises) if return_surprises else (out, state)

    def _run(self, x: Tensor, state: Any, run: Callable) -> tuple[Tensor, Any, tuple[Tensor, ...]]:
        """Return (out [b n d], the next state, (inner loss, learning rate) [b h n]). Arguments are checked.

        run: `call`, or `step`, which gives no inner loss: runs the modules within, as `run(module, *arguments)`."""
        raise NotImplementedError

    def _check_call(self, x: Tensor, state: LayerState | None) -> None:
        memory = self.remember.memory
        check_tokens(x, "x", memory.dim, memory.memory_model_parameters[0])
        if state is None:
            return
        if not isinstance(state, self.state_type):
            takes = f"the {self.state_type.__name__} that the call before returned"
            raise wrong("state", Words(type(state).__name__), takes)
        check_identity(self.configuration, state.configuration, "state", type(self).__init__)


def layer_step(layer: Layer, x: Tensor, state: LayerState | None = None, return_surprises: bool = False):
    """Run one token, without surprises."""
    if state is None or state.configuration != layer.configuration:
        return None
    out, after, _ = layer._run(x, state, step)
    return (out, after, ()) if return_surprises else (out, after)


class PersistentTokens(nn.Module):
    """p learned tokens [p d] in front of every sequence (eq. 19)."""

    def __init__(self, n_persistent: int, dim: int):
        super().__init__()
        p, dim = count(n_persistent, "n_persistent"), positive_int(dim, "dim")
        self.tokens = nn.Parameter(torch.randn(p, dim) * 0.02, requires_grad=p > 0)

    def forward(self) -> Tensor:
        return self.tokens

    def before(self, x: Tensor) -> Tensor:
        """Put the tokens in front of x: [b n d] -> [b p+n d]."""
        return torch.cat((self.tokens.to(x.dtype).expand(x.shape[0], -1, -1), x), dim=1)


class Remember(nn.Module):
    """Writes a stream to a memory, persistent tokens first, and reads it at every token."""

    def __init__(self, memory: NeuralMemory, n_persistent: int = 0):
        super().__init__()
        self.memory = memory
        self.persistent = PersistentTokens(n_persistent, memory.dim)

    def forward(self, x: Tensor, state: NeuralMemState | None):
        """Return (output [b n d], output at the persistent tokens [b p d], next state, surprises of x [b n d]).

        The persistent tokens come before the first token of a stream, where the state is None. surprises: (inner loss,
        learning rate) [b h n], and with surprise_source = "prediction" the predictor's error [b n]; with chunks of
        several tokens they are those of the complete chunks.
        """
        p = self.persistent().shape[0] if state is None else 0
        seq = self.persistent.before(x) if p else x
        written = 0 if state is None else state.seq_index
        read, state, surprises = self.memory(seq, state=state, return_surprises=True)
        read = read if p else with_unused(read, self.persistent.parameters())
        state = state._replace(updates=None)  # they belong to one call
        first = max(self.persistent.tokens.shape[0] - written, 0)
        loss, rate, *errors = surprises
        of_pairs = (s[..., first * self.memory.kv_per_token :] for s in (loss, rate))
        return read[:, p:], read[:, :p], state, (*of_pairs, *(error[..., first:] for error in errors))

    def recall(self, x: Tensor, weights: Mapping[str, Tensor], run: Callable) -> Tensor:
        """Read fast weights, name -> [(b h) ...], at x [b n d]: [b n d]; with `step` at its last token."""
        return read_last(self.memory, x, weights) if run is step else self.memory.retrieve_memories(x, weights)


def remember_step(remember: Remember, x: Tensor, state: NeuralMemState | None):
    """Read one token, without surprises."""
    if state is None:
        return None
    read, state = step(remember.memory, x, state=state)
    return read, read[:, :0], state._replace(updates=None), ()


STEPS[Remember] = remember_step
