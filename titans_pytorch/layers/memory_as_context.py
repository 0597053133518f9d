"""A layer of the memory-as-context transformer: memory, attention, feed-forward, each on the residual streams.

ein letters: b batch, s streams, h heads, n tokens, d features, v views (query, key, value), c choices of a view
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.common.checks import positive_number, wrong
from titans_pytorch.layers.attention import KeyValueCache, SegmentedAttention
from titans_pytorch.layers.norms import RMSNorm

VIEWS = 3
VIEWS_PER_LAYER = 4  # activations of each earlier layer that a view may mix


class SwiGLU(nn.Module):
    """[... 2d] -> [... d]: the first half times silu of the second (arXiv 2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        x, gate = x.chunk(2, dim=-1)
        return x * F.silu(gate)


def feed_forward(dim: int, mult: float = 4) -> nn.Sequential:
    """Build RMSNorm and a gated feed-forward. Two thirds of dim * mult inner features make it as large as an MLP."""
    inner = int(dim * positive_number(mult, "ff_mult") * 2 / 3)
    if inner < 1:
        raise wrong("ff_mult", mult, "a number that leaves at least one inner feature")
    return nn.Sequential(RMSNorm(dim), nn.Linear(dim, inner * 2), SwiGLU(), nn.Linear(inner, dim))


class ViewSelector(nn.Module):
    """Softmax mixtures for the memory's query, key and value views.

    The choices are the memory's own input and, for each earlier layer, input and output of attention and of the
    feed-forward."""

    def __init__(self, dim: int, earlier_layers: int):
        super().__init__()
        self.norm = RMSNorm(dim)
        self.to_weights = nn.Linear(dim, VIEWS * (1 + VIEWS_PER_LAYER * earlier_layers))

    def forward(self, own: Tensor, earlier: tuple[Tensor, ...]) -> Tensor:
        """Mix own [b n d] and earlier tensors [b n d] into views [v b n d]."""
        weights = rearrange(self.to_weights(self.norm(own)), "b n (v c) -> v b n c", v=VIEWS).softmax(dim=-1)
        choices = torch.stack((own, *earlier), dim=-2)
        return torch.einsum("vbnc,bncd->vbnd", weights.to(choices.dtype), choices)


class LayerCache(NamedTuple):
    """A layer's state between calls: attention's keys and values, the memory's state."""

    attention: KeyValueCache | None = None
    memory: Any = None

    def compact(self) -> "LayerCache":
        """Drop what belongs to one call: keys that no later query can see, the memory's updates."""
        attention = None if self.attention is None else self.attention.compact()
        return LayerCache(attention, None if self.memory is None else self.memory._replace(updates=None))


class Earlier(NamedTuple):
    """Results of earlier layers that later layers use.

    values: the first layer's attention values [b h n d].
    updates: the fast weights of the nearest earlier memory layer, chunk by chunk.
    activations: branch inputs and outputs that views may mix, each [b n d].
    surprises: (inner loss, learning rate) of each memory so far; None where they are not needed.
    """

    values: Tensor | None = None
    updates: Any = None
    activations: tuple[Tensor, ...] = ()
    surprises: tuple[tuple[Tensor, ...], ...] | None = None


class MemoryAsContextLayer(nn.Module):
    """One layer. `new_connection(add_branch_out_to_residual = ...)` makes a branch's connection to the streams.

    Args:
        new_connection: see `residual_streams`.
        attention, feed_forward, memory: the branches; memory: a NeuralMemory, or None.
        view_selector: mixes the memory's views; None: all views are its branch input.
        gate_attn_output: the sigmoid of the memory's output multiplies attention's output; nothing else uses it.
        leave_updates, leave_activations: pass these to later layers.
    """

    def __init__(
        self,
        new_connection: Callable[..., nn.Module],
        attention: SegmentedAttention,
        feed_forward: nn.Sequential,
        memory: Any = None,
        view_selector: ViewSelector | None = None,
        gate_attn_output: bool = False,
        leave_updates: bool = False,
        leave_activations: bool = False,
    ):
        super().__init__()
        self.gate_attn_output = gate_attn_output
        self.leave_updates = leave_updates
        self.leave_activations = leave_activations

        self.memory = memory
        self.view_selector = view_selector
        self.attention = attention
        self.feed_forward = feed_forward
        if memory is not None:
            self.memory_connection = new_connection(add_branch_out_to_residual=not gate_attn_output)
        self.attention_connection = new_connection()
        self.feed_forward_connection = new_connection()

    def forward(
        self, streams: Tensor, earlier: Earlier, cache: LayerCache, disable_flex_attn: bool = False
    ) -> tuple[Tensor, Earlier, LayerCache]:
        """Run the layer on streams [(b s) n d]. Returns streams, `earlier` for the next layer, and the next cache."""
        streams, gate, state, earlier = self._use_memory(streams, earlier, cache)

        attn_in, add = self.attention_connection(streams)
        attn_out, (values, attn_cache) = self.attention(
            attn_in,
            value_residual=earlier.values,
            disable_flex_attn=disable_flex_attn,
            output_gating=gate,
            cache=cache.attention,
        )
        streams = add(attn_out)

        ff_in, add = self.feed_forward_connection(streams)
        ff_out = self.feed_forward(ff_in)
        streams = add(ff_out)

        if earlier.values is None:
            earlier = earlier._replace(values=values)
        if self.leave_updates and state is not None:
            earlier = earlier._replace(updates=state.updates)
        if self.leave_activations:
            earlier = earlier._replace(activations=(*earlier.activations, attn_in, attn_out, ff_in, ff_out))
        return streams, earlier, LayerCache(attn_cache, state)

    def _use_memory(
        self, streams: Tensor, earlier: Earlier, cache: LayerCache
    ) -> tuple[Tensor, Tensor | None, Any, Earlier]:
        """Return streams with the memory's output, the gate of attention's output (or None), the memory's next state,
        and `earlier` with its surprises."""
        if self.memory is None:
            return streams, None, None, earlier
        branch, add = self.memory_connection(streams)
        views = branch if self.view_selector is None else self.view_selector(branch, earlier.activations)
        retrieved, state, surprises = self.memory(
            views, state=cache.memory, prev_weights=earlier.updates, return_surprises=True
        )
        if earlier.surprises is not None:
            earlier = earlier._replace(surprises=(*earlier.surprises, surprises))
        if self.gate_attn_output:
            return streams, retrieved.sigmoid(), state, earlier
        return add(retrieved), None, state, earlier
