"""The sequential engine: any memory network, any rule, one chunk after the other. All other code is tested against it.

Surprises come from functional_call under vmap and one autograd.grad. (vmap of grad gives the same numbers, but breaks
activation checkpointing and saved-tensor hooks.)

Letters: B rows (batch and heads), m chunks, G read groups, r queries per group, d features.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from titans_pytorch.ops.modes import eager, inner_gradients, ordinary
from titans_pytorch.ops.positions import Rows
from titans_pytorch.rules.base import like
from titans_pytorch.rules.rates import skip_below_threshold, skip_pairs

from .base import Carry, Chunks, Engine, Tensors, Window
from .plan import Plan
from .weight_paths import BuiltPath, Path


class SequentialEngine(Engine):
    def plan(self, chunks: Chunks, mini_batch: int) -> Plan:
        return Plan(min(mini_batch, len(chunks)), dual=False)

    def window(self, chunks: Chunks, carry: Carry, plan: Plan) -> Window:
        loss, gradients = self._gradients(chunks, carry.start)
        rates = skip_below_threshold(chunks.rates, loss, chunks.threshold)
        paths, slots = {}, {}
        for index, (name, gradient) in enumerate(gradients.items()):
            surprise = self.rule.surprise(gradient, None if rates.modulation is None else rates.modulation[..., index])
            carried = None if carry.slots is None else carry.slots[name]
            written = replace(chunks, rates=rates)
            entries, slots[name] = self._write(name, surprise, carry.weights[name], carried, written)
            paths[name] = BuiltPath(torch.stack(entries, dim=1))
        return Window(chunks.first, len(chunks), paths, slots.__getitem__, loss, rates.learning_rate)

    def _write(self, name: str, surprise: Tensor, weights: Tensor, slots, chunks: Chunks):
        """The fast weights before each chunk and after the last, and the slots after the last. surprise [B m ...]."""
        if slots is None:
            slots = self.rule.init(weights)
        slots, entries, rates = tuple(slots), [weights], chunks.rates
        fresh = None if chunks.initial is None else self.rule.init(chunks.initial[name])
        for i, surprise_i in enumerate(surprise.unbind(1)):
            weights, slots = chunks.restarted(name, weights, i), chunks.restarted_slots(slots, fresh, i)
            before = (weights, *slots)
            weights, slots = self.rule.update(weights, surprise_i, slots, rates.chunk(i))
            if rates.active is not None:
                active = like(rates.active[:, i], weights)
                kept = (torch.where(active, new, old) for new, old in zip((weights, *slots), before, strict=True))
                weights, *slots = kept
                slots = tuple(slots)
            entries.append(weights)
        return entries, slots

    @eager
    def _gradients(self, chunks: Chunks, start: Tensors) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The inner loss of each pair [B m p], and for each chunk the gradient of the sum over its pairs of learning
        rate times loss, at the mini-batch start weights: name -> [B m ...]."""
        m = len(chunks)

        def of_chunks(name: str) -> Tensor:
            weight = ordinary(start[name])
            weight = weight.unsqueeze(1).expand(-1, m, *weight.shape[1:])
            if chunks.rates.start_scale is not None:
                weight = like(ordinary(chunks.rates.start_scale), weight) * weight
            if chunks.residual is None:
                return weight
            assert chunks.rates.residual_mix is not None
            earlier = ordinary(chunks.residual.entries(name, chunks.first, m))
            return weight + like(ordinary(chunks.rates.residual_mix), earlier) * earlier

        def total(params: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            prediction = self._call(dict(zip(start, params, strict=True)), ordinary(chunks.keys))
            loss = self.rule.loss(prediction, ordinary(chunks.values), *map(ordinary, chunks.rates.bounds))
            return (loss * skip_pairs(ordinary(chunks.rates.learning_rate), loss, chunks.threshold)).sum(), loss

        gradients, loss = inner_gradients(total, lambda: tuple(map(of_chunks, start)))
        return loss, dict(zip(start, gradients, strict=True))

    def read(self, paths: Mapping[str, Path], queries: Tensor, rows: Rows) -> Tensor:
        return self._call({name: path.rows(rows) for name, path in paths.items()}, queries)

    def _call(self, params: Tensors, x: Tensor) -> Tensor:
        """The network at x [B G r d], every [B G] with its own parameters."""
        flat = {k: v.flatten(0, 1) for k, v in params.items()}
        out = vmap(lambda p, row: functional_call(self.model, p, row))(flat, x.flatten(0, 1))
        return out.unflatten(0, x.shape[:2])
