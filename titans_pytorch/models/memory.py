"""The memory as the family's layers use it: the paper's rule, and what a state needs around it.

Letters: b batch, n tokens, d features, h heads, p persistent tokens
"""

import torch
from torch import Tensor, nn

from titans_pytorch.attention import count
from titans_pytorch.checks import Words, check_flags, check_tokens, flags, positive_int, positive_number, wrong
from titans_pytorch.identity import check_identity
from titans_pytorch.memory_models import MemoryMLP
from titans_pytorch.memory_state import NeuralMemState
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.presets import paper_memory_kwargs
from titans_pytorch.unused import with_unused

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
    init_scale: float = 1.0,
    surprise_threshold: float | None = None,
    **options,
) -> NeuralMemory:
    """`NeuralMemory.paper` with the settings of a ModelConfig: step, momentum and decay of each token (arXiv
    2501.00663, eq. 13 and 14); surprises taken at the weights at the start of each `chunk_size` tokens (eq. 16);
    convolution, SiLU and norm on queries and keys; a normalised and gated output (section 4.4).

    Args:
        dim: features of a token.
        heads: memories side by side, of dim / heads features.
        depth: matrices of the memory network.
        hidden: its hidden features (4 * dim / heads).
        chunk_size: tokens between moves of the weights at which surprises are taken.
        momentum: past surprise carries on.
        decay: the memory forgets.
        max_step: largest step, for a loss that is the mean over features.
        conv_kernel: tokens that the convolution sees; 0 or 1: none.
        qk_norm: "l2", "rms" or "none".
        norm: the memory network within a LayerNorm and a residual, mem_model_norm_add_residual. The paper has neither;
            a memory that fades then leaves the LayerNorm almost nothing to normalise, and rounding grows.
        init_scale: of the initial weights, as a multiple of Xavier's.
        surprise_threshold: a token whose surprise is below it changes nothing.
        options: further keywords of NeuralMemory. init_decay_bias is -6 by default: decay starts at 0.0025 a token.

    Raises:
        ValueError: for an argument of the wrong type, shape or range, by name.
    """
    check_flags(titans_memory, locals())
    positive_int(dim, "dim"), positive_int(heads, "heads"), positive_number(init_scale, "init_scale")
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
            weight.mul_(init_scale)
    changes = {
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
        memory.rates.to_decay_factor.requires_grad_(False)
    return memory


def check_memory(memory: NeuralMemory | None, dim: int, heads: int) -> NeuralMemory:
    """A layer's memory: as given, or the paper's. It must take [b n d] and answer with the same."""
    if memory is None:
        return titans_memory(dim, heads=heads)
    if not isinstance(memory, NeuralMemory):
        raise wrong("memory", Words(type(memory).__name__), "a NeuralMemory, or None for the paper's")
    if memory.dim != dim or memory.diff_views or memory.accept_weight_residual or not memory.tokenwise:
        takes = f"one of dim = {dim}, without diff views or weight residual, whose model is tokenwise"
        raise wrong("memory", Words(f"a NeuralMemory of dim {memory.dim}"), takes)
    return memory


class Layer(nn.Module):
    """Base of the family's layers: tokens [b n d] and the state of the call before in, (out [b n d], state) out."""

    configuration: str
    remember: "Remember"

    def _check_call(self, x: Tensor, state, kind: type, return_surprises: bool) -> None:
        """Refuses anything but tokens [b n d], and a state that is not of this `kind` or made by other settings."""
        memory = self.remember.memory
        flags(return_surprises=return_surprises)
        check_tokens(x, "x", memory.dim, memory.memory_model_parameters[0])
        if state is None:
            return
        if not isinstance(state, kind):
            raise wrong("state", Words(type(state).__name__), f"the {kind.__name__} that the call before returned")
        check_identity(self.configuration, state.configuration, "state", type(self).__init__)


class PersistentTokens(nn.Module):
    """p learned tokens in front of every sequence, eq. 19: [p d], the same whatever is read."""

    def __init__(self, n_persistent: int, dim: int):
        super().__init__()
        p, dim = count(n_persistent, "n_persistent"), positive_int(dim, "dim")
        self.tokens = nn.Parameter(torch.randn(p, dim) * 0.02, requires_grad=p > 0)

    def forward(self) -> Tensor:
        return self.tokens

    def before(self, x: Tensor) -> Tensor:
        """[p+n d] of [b n d]: with the tokens in front."""
        return torch.cat((self.tokens.to(x.dtype).expand(x.shape[0], -1, -1), x), dim=1)


class Remember(nn.Module):
    """Reads a stream into a memory, persistent tokens first, and answers at every token."""

    def __init__(self, memory: NeuralMemory, n_persistent: int = 0):
        super().__init__()
        self.memory = memory
        self.persistent = PersistentTokens(n_persistent, memory.dim)

    def forward(self, x: Tensor, state: NeuralMemState | None):
        """x [b n d]: (read [b n d], read at the persistent tokens [b p d], next state, surprises of x).

        The persistent tokens come before the first token of a stream, where the state is None. surprises: (loss, step)
        [b h n], and with surprise_source = "prediction" the predictor's error [b n].
        """
        p = self.persistent().shape[0] if state is None else 0
        seq = self.persistent.before(x) if p else x
        read, state, surprises = self.memory(seq, state=state, return_surprises=True)
        read = read if p else with_unused(read, self.persistent.parameters())
        state = state._replace(updates=None)  # the history of one call
        return read[:, p:], read[:, :p], state, tuple(s[..., s.shape[-1] - x.shape[1] :] for s in surprises)
