"""The reference engine: any memory model, every tensor built, nothing clever. The others are tested against it.

functional_call under vmap forward, then one autograd.grad (vmap of grad gives the same numbers, but breaks activation
checkpointing and saved-tensor hooks).
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from titans_pytorch.engines.plan import Plan
from titans_pytorch.engines.recurrence import combined_update, like, where_active
from titans_pytorch.engines.update_rule import UpdateRule, clamp_scale
from titans_pytorch.engines.weight_paths import BuiltPath, Rows
from titans_pytorch.engines.written import Carry, StoreChunks, Tensors, Window
from titans_pytorch.memory.surprise import admit, surprising_step
from titans_pytorch.ops.modes import eager, inner_gradients, ordinary
from titans_pytorch.ops.newton_schulz import naive_newton_schulz
from titans_pytorch.ops.scan import scan


class ReferenceEngine:
    def __init__(self, model: nn.Module, rule: UpdateRule, use_accelerated_scan: bool = False):
        self.model, self.rule = model, rule
        self.scan = partial(scan, use_accelerated=use_accelerated_scan)

    def plan(self, chunks: StoreChunks, span: int) -> Plan:
        return Plan(min(span, len(chunks)), dual=False)

    def still(self, first: int, memory: Tensors) -> Window:
        paths = {k: BuiltPath(v.unsqueeze(1)) for k, v in memory.items()}
        return Window(first, 0, paths, self.reader(paths), lambda name: ())

    def window(self, chunks: StoreChunks, carry: Carry, plan: Plan) -> Window:
        loss, grads = self._gradients(chunks, carry.anchor)
        rates = admit(chunks.rates, loss, chunks.threshold)
        paths, momenta = {}, {}
        for index, (name, grad) in enumerate(grads.items()):
            surprise = -grad
            if rates.modulation is not None:
                surprise = surprise * like(rates.modulation[..., index], surprise)
            carried = carry.momentum and carry.momentum[name]
            update, momenta[name] = combined_update(surprise, rates, carried, self.scan)
            if self.rule.spectral_norm and update.ndim == 4:
                update = naive_newton_schulz(update)
            start = carry.memory[name]
            memory = self.scan(*where_active(rates.active, rates.keep, update), start)
            paths[name] = BuiltPath(torch.cat((start.unsqueeze(1), memory), dim=1))
        return Window(chunks.first, len(chunks), paths, self.reader(paths), momenta.__getitem__, loss, rates.step)

    @eager
    def _gradients(self, chunks: StoreChunks, anchor: Tensors) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Per chunk, of the sum over its tokens of step x loss, at the anchor: name -> [B m ...]."""
        m = len(chunks)

        def of_chunks(name: str) -> Tensor:
            weight = ordinary(anchor[name])
            weight = weight.unsqueeze(1).expand(-1, m, *weight.shape[1:])
            if chunks.residual is None:
                return weight
            earlier = ordinary(chunks.residual.entries(name, chunks.first, m))
            return weight + like(ordinary(chunks.rates.residual_mix), earlier) * earlier

        def total(params: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            prediction = self._call(dict(zip(anchor, params, strict=True)), ordinary(chunks.keys))
            loss = self.rule.loss(prediction, ordinary(chunks.values))
            return (loss * surprising_step(ordinary(chunks.rates.step), loss, chunks.threshold)).sum(), loss

        grads, loss = inner_gradients(total, lambda: tuple(map(of_chunks, anchor)))
        if self.rule.max_grad_norm is not None:
            grads = [g * like(clamp_scale(g.flatten(2).square().sum(-1), self.rule.max_grad_norm), g) for g in grads]
        return loss, dict(zip(anchor, grads, strict=True))

    def _call(self, params: Tensors, x: Tensor) -> Tensor:
        """The model on x [B g n d], every [B g] with its own parameters."""
        flat = {k: v.flatten(0, 1) for k, v in params.items()}
        out = vmap(lambda p, row: functional_call(self.model, p, row))(flat, x.flatten(0, 1))
        return out.unflatten(0, x.shape[:2])

    def reader(self, paths: Mapping[str, BuiltPath]):
        def read(x: Tensor, rows: Rows) -> Tensor:
            return self._call({name: path.weights[:, rows] for name, path in paths.items()}, x)

        return read
