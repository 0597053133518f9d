"""Decoder: runs a MemoryAsContextTransformer on one token after the other.

It returns the results of `model(ids, cache=cache, return_cache=True)` with one token per call. Terms that depend on
parameters alone are computed once, states are updated in place, and checks are not repeated.

Letters: b batch, s streams (side by side in rows), d features, v tokens of the vocabulary
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from titans_pytorch.decoding.attention import AttentionStep, Turns
from titans_pytorch.decoding.connection import CODES, connection_step, streams_step
from titans_pytorch.decoding.memory import memory_step
from titans_pytorch.decoding.norm import norm_step
from titans_pytorch.layers.attention import SegmentedAttention
from titans_pytorch.layers.longterm_tokens import places
from titans_pytorch.layers.memory_as_context import Earlier, LayerCache, MemoryAsContextLayer
from titans_pytorch.layers.residual_streams import HyperConnection
from titans_pytorch.neural_memory import NeuralMemory

FEW = 4  # rows, up to which arithmetic on Python numbers is faster than kernels


class LayerStep:
    """A MemoryAsContextLayer for one token: its three branches in their order."""

    def __init__(self, layer: MemoryAsContextLayer, cache: LayerCache, turns: Turns):
        assert cache.attention is not None  # a call of the model has filled it
        self.layer = layer
        self.attention = AttentionStep(layer.attention, cache.attention, turns)
        self.attention_connection = connection_step(layer.attention_connection)
        self.feed_forward_connection = connection_step(layer.feed_forward_connection)
        norm, *rest = layer.feed_forward
        self.feed_forward_norm, self.feed_forward_rest = norm_step(norm), rest
        self.memory = None if layer.memory is None else memory_step(layer.memory, cache.memory)
        if self.memory is not None:
            self.memory_connection = connection_step(layer.memory_connection)

    def step(self, streams: Tensor, earlier: Earlier) -> tuple[Tensor, Earlier]:
        """Run the layer on streams [(b s) 1 d]. Returns streams and `earlier` for the next layer."""
        layer, gate = self.layer, None
        if self.memory is not None:
            branch, read = self.memory_connection.read(streams)
            views = branch if layer.view_selector is None else layer.view_selector(branch, earlier.activations)
            retrieved, updates = self.memory.step(views, earlier.updates)
            if layer.gate_attn_output:
                gate = retrieved.sigmoid()
            else:
                streams = self.memory_connection.write(read, retrieved)
            if layer.leave_updates:
                earlier = earlier._replace(updates=updates)

        attn_in, read = self.attention_connection.read(streams)
        attn_out, values = self.attention.step(attn_in, earlier.values, gate)
        streams = self.attention_connection.write(read, attn_out)

        ff_in, read = self.feed_forward_connection.read(streams)
        ff_out = self.feed_forward_norm(ff_in)
        for module in self.feed_forward_rest:
            ff_out = module(ff_out)
        streams = self.feed_forward_connection.write(read, ff_out)

        if earlier.values is None:
            earlier = earlier._replace(values=values)
        if layer.leave_activations:
            earlier = earlier._replace(activations=(*earlier.activations, attn_in, attn_out, ff_in, ff_out))
        return streams, earlier

    def cache(self) -> LayerCache:
        return LayerCache(self.attention.cache(), None if self.memory is None else self.memory.state())


class AxialPositions:
    """Position embeddings, one place after the other. A row of the grid is computed when it begins."""

    def __init__(self, embedding: Any, width: int, dtype: torch.dtype):
        self.row_net, column_net = embedding.mlps
        self.width, self.dtype = width, dtype
        # one by one, as in calls of one token: the rounding of a quantised map depends on all its inputs
        self.columns = torch.cat([column_net(number) for number in torch.arange(width, dtype=dtype)[:, None, None]])
        self.row = -1
        self.places: tuple[Tensor, ...] = ()

    def at(self, place: int) -> Tensor:
        """Return the embedding [d] of a place."""
        row, column = divmod(place, self.width)
        if row != self.row:
            number = torch.full((1, 1), float(row), dtype=self.columns.dtype)
            self.row, self.places = row, (self.row_net(number) + self.columns).to(self.dtype).unbind(0)
        return self.places[column]


class Decoder:
    """Reads one token after the other, without gradients, while no parameter changes; see `can_decode`.

    model: a MemoryAsContextTransformer; cache: the MacCache that it returned."""

    def __init__(self, model: Any, cache: Any):
        self.model, self.tokens, self.segment_len = model, cache.tokens, model.segment_len
        self.given = cache
        self.norm = norm_step(model.norm)
        self.expand, self.reduce = streams_step(model.expand_streams, model.reduce_streams)
        self.longterm = model.longterm_mems.unbind(0)
        self.place = places(cache.tokens, model.segment_len, len(self.longterm))
        dtype = model.longterm_mems.dtype
        self.positions = AxialPositions(model.axial_pos_emb, model.memory_segment_len, dtype)
        shared: list[Turns] = []
        self.layers = [
            LayerStep(layer, layer_cache, _turns(layer.attention, shared, dtype))
            for layer, layer_cache in zip(model.layers, cache.layers, strict=True)
        ]

    def step(self, ids: Tensor) -> Tensor:
        """Read the next token's ids, long [b 1]. Returns logits [b v]."""
        model = self.model
        if self.tokens and self.tokens % self.segment_len == 0:
            for token in self.longterm:
                self._read(token.expand(ids.shape[0], 1, -1))
        x = self._read(model.token_emb(ids))
        self.tokens += 1
        return model.to_logits(self.norm(x))[:, 0]

    def _read(self, x: Tensor) -> Tensor:
        """Run the embedding of the next place, [b 1 d] -> [b 1 d]."""
        streams, earlier = self.expand(x + self.positions.at(self.place)), Earlier()
        for layer in self.layers:
            streams, earlier = layer.step(streams, earlier)
        self.place += 1
        return self.reduce(streams)

    def cache(self) -> Any:
        """Return the model's cache after the tokens read."""
        layers = tuple(layer.cache() for layer in self.layers)
        return self.given._replace(tokens=self.tokens, layers=layers, configuration=self.model.configuration)


def _turns(attention: SegmentedAttention, shared: list[Turns], dtype: torch.dtype) -> Turns:
    """Return the factors of an attention layer, shared with layers of equal frequencies."""
    for turns in shared:
        if torch.equal(turns.rotary.freqs, attention.rotary_emb.freqs):
            return turns
    shared.append(Turns(attention.rotary_emb, dtype))
    return shared[-1]


def can_decode(model: Any, batch: int) -> bool:
    """Return whether a Decoder gives the model's results, and faster: a few rows in float32 or float64 on a CPU, and
    no skipped module has a hook or an overridden forward."""
    parameter = model.longterm_mems
    bypassed: list[tuple[nn.Module, type[nn.Module]]] = []
    for layer in model.layers:
        if not isinstance(layer, MemoryAsContextLayer):  # a wrapper
            return False
        bypassed += [(layer, MemoryAsContextLayer), (layer.attention, SegmentedAttention)]
        bypassed.append((layer.feed_forward, nn.Sequential))
        connections = [layer.attention_connection, layer.feed_forward_connection]
        if layer.memory is not None:
            bypassed.append((layer.memory, NeuralMemory))
            connections.append(layer.memory_connection)
        bypassed += [(c, HyperConnection) for c in connections if isinstance(c, HyperConnection)]
    own = all(type(module).forward is kind.forward and "forward" not in vars(module) for module, kind in bypassed)
    silent = [model, *(module for module, _ in bypassed)]
    return (
        own
        and batch <= FEW
        and parameter.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and all(p.dtype == parameter.dtype for name, p in model.named_parameters() if not name.endswith("freqs"))
        and parameter.dtype in CODES
        and not model.training
        and not _hooked(silent)
    )


def _hooked(modules: Sequence[nn.Module]) -> bool:
    everywhere = torch.nn.modules.module
    hooks = [everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks]
    for module in modules:
        hooks += [module._forward_hooks, module._forward_pre_hooks]
    return any(hooks)
