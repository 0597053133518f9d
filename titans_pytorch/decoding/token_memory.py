"""NeuralMemory, written and read at every token (chunk_size = 1): one token as a function of the state.

Letters: b batch, h heads, B rows (b h), d features of a token, e of a head (also the sides of a weight), k tokens that
the convolution sees, w channels
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from titans_pytorch.common.switches import stores
from titans_pytorch.decoding.memory import HeldWeights
from titans_pytorch.decoding.steps import STEPS, silent, step
from titans_pytorch.engines.chunkwise import ChunkwiseEngine
from titans_pytorch.memory.diverged import warn_if_diverged
from titans_pytorch.memory.projections import CausalConv, Projections
from titans_pytorch.memory.rates import AveragePool, Rates
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.ops.positions import ends_mini_batch
from titans_pytorch.rules.base import like
from titans_pytorch.rules.rates import above_threshold
from titans_pytorch.rules.titans import TitansRule


class StartWeights(HeldWeights):
    """`TapedWeights` of the mini-batch start weights. `uses`: name -> the inputs and output gradients of its products,
    [B 1 e] each."""

    def __init__(self, weights: Mapping[str, Tensor], keys: Tensor):
        super().__init__(weights)
        self.keys = keys
        self.uses: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in weights}

    def matmul(self, x, name):
        def back(dy):
            self.uses[name].append((x, dy))
            return 0.0 if x is self.keys else torch.bmm(dy, self.weights[name].mT)

        return super().matmul(x, name), back

    def mul(self, x, name):
        def back(dy):
            self.uses[name].append((x, dy))
            return dy * self.weights[name]

        return super().mul(x, name), back


def memory_step(memory: NeuralMemory, x: Tensor, state: NeuralMemState | None = None, **options: Any):
    """Write and read x [b 1 d]: (output [b 1 d], next state without `updates`)."""
    if state is None or any(options.values()) or not (_fits(memory) and _continues(memory, x, state)):
        return None
    warn_if_diverged(memory, state, 1)
    own = memory.projections
    tokens, asked = step(own.store_norm, x), step(own.retrieve_norm, x)
    keys, values, store_conv = own.to_keys(tokens), own.to_values(tokens), None
    if own.keys_conv is not None and own.values_conv is not None:
        weight = torch.cat((own.keys_conv.weight, own.values_conv.weight), dim=-1)
        both, store_conv = _convolved(torch.cat((keys, values), dim=-1), state.store_conv, weight)
        keys, values = both.chunk(2, dim=-1)
    shape = (x.shape[0], memory.internal_heads, 1, -1)
    keys = own.k_norm(own.activation(keys).view(shape)).flatten(0, 1)
    values = own.activation(values).view(shape).flatten(0, 1)

    threshold, active, last_token = memory.surprise_threshold, None, None
    if memory.predictor is not None:
        errors, last_token = memory.predictor(tokens, state.last_token)
        if threshold is not None:
            active = above_threshold(errors, threshold).repeat_interleave(memory.internal_heads, dim=0)
            threshold = None
    after, slots = _written(memory, tokens, keys, values, state, threshold, active)
    out, query_conv = _read(memory, own.to_queries(asked), asked, state.query_conv, after)
    count = state.seq_index + 1
    return out, state._replace(
        seq_index=count,
        weights=after if ends_mini_batch(count, memory.mini_batch) else state.weights,
        states=(after, slots),
        updates=None,
        query_conv=query_conv,
        store_conv=store_conv,
        last_token=last_token,
    )


STEPS[NeuralMemory] = memory_step


def read_last(memory: NeuralMemory, seq: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Return `memory.retrieve_memories(seq, weights)` at the last of n tokens: seq [b n d] -> [b 1 d]."""
    if not _fits(memory):
        return memory.retrieve_memories(seq, weights)[:, -1:]
    own = memory.projections
    tokens = step(own.retrieve_norm, seq)
    mapped = own.to_queries(tokens)
    missing = own.looks_back + 1 - seq.shape[1]
    before = mapped[:, :-1] if missing == 0 else pad(mapped[:, :-1], (0, 0, missing, 0))
    return _read(memory, mapped[:, -1:], tokens[:, -1:], before, weights)[0]


def _fits(memory: NeuralMemory) -> bool:
    """Return whether the memory writes one pair for each token by the paper's rule, on a network with `with_vjp`, and
    no module skipped here has a hook or another forward."""
    config, engine, parts = memory.chunk_config, memory.engine, memory._modules
    projections, rates = memory.projections, memory.rates
    if not (
        type(memory) is NeuralMemory
        and config.chunk_size == (1, 1)
        and config.kv_per_token == 1
        and not memory.diff_views
        and parts.get("gates") is None
        and memory._parameters.get("transition_gate") is None
        and type(engine) is ChunkwiseEngine
        and engine.has_vjp
        and type(engine.rule) is TitansRule
        and engine.rule.momentum_order < 2
        and not engine.rule.spectral_norm
        and engine.rule.max_grad_norm is None
        and not engine.rule.learned_bound
        and memory.earlier_pairs == 0
        and memory.tokenwise
        and type(projections) is Projections
        and type(rates) is Rates
        and rates._modules.get("to_learned_momentum_combine") is None
        and rates._modules.get("to_layer_modulation") is None
    ):
        return False
    pool, used = rates.reduce_to_chunk_rep, projections._modules
    convolutions = [conv for name in ("queries_conv", "keys_conv", "values_conv") if (conv := used.get(name))]
    skipped = (memory, projections, rates, pool, *convolutions)
    return (
        type(pool) is AveragePool
        and all(type(conv) is CausalConv for conv in convolutions)
        and all(silent(module) for module in skipped)
    )


def _continues(memory: NeuralMemory, x: Tensor, state: NeuralMemState) -> bool:
    """Return whether this memory returned the state for as many rows, and writes."""
    if state.configuration != memory.configuration or state.states is None or state.weights is None:
        return False
    first = next(iter(state.states[0].values()))
    convolved = state.query_conv is not None and state.store_conv is not None
    return (
        first.shape[0] == x.shape[0] * memory.internal_heads
        and first.dtype == x.dtype
        and (convolved or not memory.projections.looks_back)
        and state.cache_store_mask is None
        and state.cache_store_segment is not None
        and not memory.stopped
        and stores(memory)
    )


def _written(
    memory: NeuralMemory,
    tokens: Tensor,
    keys: Tensor,
    values: Tensor,
    state: NeuralMemState,
    threshold: float | None,
    active: Tensor | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write a pair [B 1 e]: (fast weights, momentum). active: bool [B 1], False where nothing changes; None: the inner
    loss decides, if there is a threshold."""
    rates, rule, B = memory.rates, memory.engine.rule, keys.shape[0]
    learning_rate = rates._step(tokens).reshape(B, 1)
    if active is not None:
        learning_rate = learning_rate.masked_fill(~active, 0.0)
    assert state.weights is not None
    assert state.states is not None
    retention = torch.ones_like(learning_rate)
    if rates.to_decay_factor is not None:
        retention = (-rates.to_decay_factor(tokens)).sigmoid().view(B, 1)
    begin = state.weights
    if memory.decay_first:
        begin = {name: like(retention[:, 0], weight) * weight for name, weight in begin.items()}
    start = StartWeights(begin, keys)
    prediction, back = memory.engine.model.with_vjp(keys, start)
    loss, slope = rule.loss_and_slope(prediction, values, learning_rate, threshold)
    back(slope)
    if threshold is not None:
        active = above_threshold(loss, threshold)

    momentum = None
    if rates.to_momentum is not None:
        momentum = rates.to_momentum(tokens).sigmoid().view(B, 1, 1)
    weights, slots = {}, {}
    for name, uses in start.uses.items():
        old = state.states[0][name]
        kept, new = retention.view(B, *(1,) * (old.ndim - 1)), None
        if momentum is None:
            new = _minus_gradient(kept * old, uses)
        else:
            before = state.states[1][name]
            carried = _minus_gradient(momentum.view_as(kept) * before[0], uses)
            new = torch.addcmul(carried, kept, old)
            slots[name] = carried.unsqueeze(0)
            if active is not None:
                slots[name] = torch.where(active.view_as(kept), slots[name], before)
        weights[name] = new if active is None else torch.where(active.view_as(kept), new, old)
    return weights, slots


def _minus_gradient(base: Tensor, uses: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return base [B ...] less the gradient, the sum of the uses' products."""
    for a, delta in uses:
        base = torch.baddbmm(base, a.mT, delta, alpha=-1) if base.ndim == 3 else base - (a * delta).squeeze(1)
    return base


def _read(memory: NeuralMemory, mapped: Tensor, tokens: Tensor, before: Tensor | None, weights: Mapping[str, Tensor]):
    """Read one token: (output [b 1 d], the convolution's tail). mapped: the queries [b 1 w] before the convolution."""
    own, tail = memory.projections, None
    if own.queries_conv is not None:
        mapped, tail = _convolved(mapped, before, own.queries_conv.weight)
    queries = own.q_norm(own.activation(mapped).view(tokens.shape[0], memory.internal_heads, 1, -1))
    read = memory.engine.model.with_weights(queries.flatten(0, 1), HeldWeights(weights))
    return own.output(read.view(queries.shape), tokens), tail


def _convolved(x: Tensor, before: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """CausalConv of one token: x, y [b 1 w], before and the tail [b k-1 w], weight [k w]."""
    assert before is not None
    rows = torch.cat((before, x), dim=1)
    return (rows * weight).sum(dim=1, keepdim=True), rows[:, 1:]
