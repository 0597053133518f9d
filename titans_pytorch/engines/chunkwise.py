"""The fast engine: for memory models made of matrix products. One forward and one backward of the model at the anchor,
batched over all tokens of a window, give for each weight what entered it (a) and the gradient of what left it (delta);
everything else follows from these and from the window's coefficients (ops/coefficients.py, paths.py).

Letters: B rows (batch and heads), m chunks, p pairs per chunk, G groups, r tokens per group, d and e the sides of a
weight.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from titans_pytorch.engines.plan import Plan, plan
from titans_pytorch.engines.recurrence import combined_update, on_active, where_active
from titans_pytorch.engines.update_rule import UpdateRule, clamp_scale
from titans_pytorch.engines.weight_paths import BuiltPath, DualPath, Path, Rows, weighted_gradient
from titans_pytorch.engines.written import Carry, ResidualSource, StoreChunks, Tensors, Window, built_run
from titans_pytorch.memory.rates import StoreRates
from titans_pytorch.memory.surprise import admit, surprising_step
from titans_pytorch.ops.coefficients import Coefficients, coefficients
from titans_pytorch.ops.modes import eager, enable_inner_grad, in_transform, inner_gradients, ordinary
from titans_pytorch.ops.newton_schulz import newton_schulz
from titans_pytorch.ops.scan import scan

LONG = 4096  # tokens


class FastEngine:
    """form: "dual" never builds a weight, "matrix" builds one per chunk, "auto" counts operations (costs.py)."""

    def __init__(self, model, rule: UpdateRule, taped: bool, form: str = "auto"):
        self.model, self.rule, self.taped, self.form = model, rule, taped, form
        self.shapes = tuple(tuple(p.shape) for p in model.parameters() if p.ndim == 2)

    def plan(self, chunks: StoreChunks, span: int) -> Plan:
        form = "spectral" if self.rule.spectral_norm else self.form
        rows, count, pairs, _ = chunks.keys.shape
        shapes = () if count == 1 and form == "auto" else self.shapes
        if torch.compiler.is_compiling():  # one plan for all lengths
            return plan(
                self.shapes, 1, min(span, LONG // pairs) if isinstance(span, int) else LONG // pairs, pairs, form
            )
        return plan(shapes, rows, min(span, count), pairs, form)

    def still(self, first: int, memory: Tensors) -> Window:
        paths = {k: BuiltPath(v.unsqueeze(1)) for k, v in memory.items()}
        return Window(first, 0, paths, self.reader(paths), lambda name: ())

    def window(self, chunks: StoreChunks, carry: Carry, plan: Plan) -> Window:
        loss, records = self._surprise(chunks, carry.anchor)
        rates = admit(chunks.rates, loss, chunks.threshold)
        c = None
        if plan.dual or len(chunks) > 1:  # one chunk is built as it is
            c = coefficients(*(upcast(x) for x in (rates.keep, rates.momentum, rates.combine)), rates.active)
        paths, finals = {}, {}
        for index, name in enumerate(carry.anchor):
            modulation = None if rates.modulation is None else rates.modulation[..., index]
            momentum = carry.momentum and carry.momentum[name]
            dual = plan.dual and carry.memory[name].ndim == 3
            paths[name], finals[name] = self._path(
                records[name], carry.memory[name], momentum, modulation, rates, c, dual
            )
        return Window(
            chunks.first, len(chunks), paths, self.reader(paths), lambda name: finals[name](), loss, rates.step
        )

    def _path(self, record, memory: Tensor, momentum: Sequence[Tensor] | None, modulation, rates, c, dual: bool):
        """The parameter's way through the window, and how to build the momentum at its end."""
        a, delta = record
        scale = self._scale(a, delta, modulation)
        if memory.ndim == 2 and c is not None:
            return vector_path(c, memory, momentum, a, scale)
        if not dual:
            return self._built_path(built_surprise(a, delta, scale), memory, momentum, rates)
        surprise = -c.memory_surprise if scale is None else -c.memory_surprise * scale.unsqueeze(1)

        def gradient(weights, base):
            return weighted_gradient(-weights if scale is None else -weights * scale, a, delta, base)

        path = DualPath(memory, momentum, a, delta, c, surprise)
        return path, lambda: final_momentum(c, momentum, gradient)

    def _built_path(self, surprise: Tensor, memory: Tensor, momentum: Sequence[Tensor] | None, rates: StoreRates):
        """Every entry, from one surprise per chunk [B m ...]: a pass over them per recurrence."""
        update, final = combined_update(surprise, rates, momentum, scan)
        if self.rule.spectral_norm and memory.ndim == 3:
            update = on_active(newton_schulz, update, rates.active_rows)
        gate, update = where_active(rates.active, rates.keep, update)
        return BuiltPath(scan(gate, update, memory, with_start=True)), lambda: final

    def _scale(self, a, delta, modulation: Tensor | None) -> Tensor | None:
        """What each chunk's gradient is multiplied by [B m]: the clamp's factor, then the modulation."""
        if self.rule.max_grad_norm is None:
            return modulation
        if delta is None:
            square = a.sum(dim=2).square().sum(dim=-1)
        else:  # |a^T delta|^2 without building a^T delta
            square = ((a @ a.transpose(-1, -2)) * (delta @ delta.transpose(-1, -2))).sum(dim=(-1, -2))
        clamp = clamp_scale(square, self.rule.max_grad_norm)
        return clamp if modulation is None else clamp * modulation

    def _surprise(self, chunks: StoreChunks, anchor: Tensors):
        """The loss per pair [B m p], and per parameter (a, delta), or (gradient per token, None) for a vector."""
        if self.taped:
            weights = TapedAnchor(anchor, chunks)
            prediction, back = self.model.with_vjp(chunks.keys, weights)
            loss, slope = self.rule.loss_and_slope(prediction, chunks.values, chunks.rates.step, chunks.threshold)
            back(slope)
            return loss, weights.records()
        return self._ghost_surprise(chunks, anchor)

    @eager
    def _ghost_surprise(self, chunks: StoreChunks, anchor: Tensors):
        """For models that give no way back: gradients of each product's output from one call of autograd."""
        if in_transform():
            return self._offset_surprise(chunks, anchor)
        differentiable = torch.is_grad_enabled()
        with enable_inner_grad():
            weights = GhostAnchor({k: ordinary(v) for k, v in anchor.items()}, chunks)
            prediction = self.model.with_weights(ordinary(chunks.keys), weights)
            loss = self.rule.loss(prediction, ordinary(chunks.values))
            total = (loss * surprising_step(ordinary(chunks.rates.step), loss, chunks.threshold)).sum()
            deltas = torch.autograd.grad(
                total, [z for _, _, z in weights.used], create_graph=differentiable, materialize_grads=True
            )
        for (name, x, _), delta in zip(weights.used, deltas, strict=True):
            weights.record(name, x, delta)
        return loss, weights.records()

    def _offset_surprise(self, chunks: StoreChunks, anchor: Tensors):
        """The same for torch.func, which differentiates with respect to arguments alone: to offsets of the outputs."""

        def products(offsets: Sequence[Tensor]) -> tuple[OffsetAnchor, Tensor]:
            weights = OffsetAnchor(anchor, chunks, offsets)
            return weights, self.model.with_weights(chunks.keys, weights)

        def total(offsets: tuple[Tensor, ...]):
            weights, prediction = products(offsets)
            loss = self.rule.loss(prediction, chunks.values)
            step = surprising_step(chunks.rates.step, loss, chunks.threshold)
            return (loss * step).sum(), (loss, tuple(x for _, x, _ in weights.used))

        weights, _ = products(())
        zeros = tuple(torch.zeros_like(z) for _, _, z in weights.used)
        deltas, (loss, inputs) = inner_gradients(total, lambda: zeros)
        for (name, _, _), x, delta in zip(weights.used, inputs, deltas, strict=True):
            weights.record(name, x, delta)
        return loss, weights.records()

    def reader(self, paths: Mapping[str, Path]):
        return lambda x, rows: self.model.with_weights(x, PathWeights(paths, rows))


class PathWeights:
    """`Weights` for reading: every parameter as the memory has it at each group's entry."""

    def __init__(self, paths: Mapping[str, Path], rows: Rows):
        self.paths, self.rows = paths, rows

    def matmul(self, x, name):
        return self.paths[name].matmul(x, self.rows)

    def mul(self, x, name):
        return self.paths[name].mul(x, self.rows)


class Anchor:
    """The weights a surprise is taken at: the anchor, and a weight residual where there is one (applied, not built)."""

    def __init__(self, anchor: Tensors, chunks: StoreChunks):
        self.anchor, self.first, self.residual = anchor, chunks.first, chunks.residual
        if self.residual is not None:
            self.mix = chunks.rates.residual_mix[:, :, None, None]
        self._records: dict[str, list] = {name: [] for name in anchor}
        self._empty = chunks.keys[:, :, :0]

    def forward(self, x: Tensor, name: str) -> Tensor:
        y = through(x, self.anchor[name])
        return y if self.residual is None else y + self.mix * self.residual.matmul(x, name, self.first)

    def backward(self, dy: Tensor, name: str) -> Tensor:
        dx = through(dy, self.anchor[name].transpose(-1, -2))
        return dx if self.residual is None else dx + self.mix * self.residual.matmul_t(dy, name, self.first)

    def scaled(self, x: Tensor, name: str) -> Tensor:
        y = x * self.anchor[name][:, None, None]
        return y if self.residual is None else y + self.mix * self.residual.mul(x, name, self.first)

    def record(self, name: str, a: Tensor, delta: Tensor):
        self._records[name].append((a, delta) if self.anchor[name].ndim == 3 else (a * delta, None))

    def records(self):
        return {name: self._join(name, uses) for name, uses in self._records.items()}

    def _join(self, name: str, uses):
        """A parameter used twice has the pairs of both uses; one that is not used has none."""
        if not uses:
            sides = self.anchor[name].shape[1:]
            blank = [self._empty.new_zeros(*self._empty.shape[:3], side) for side in sides]
            return (blank[0], blank[1] if len(sides) == 2 else None)
        if len(uses) == 1:
            return uses[0]
        a, delta = zip(*uses, strict=True)
        return torch.cat(a, dim=2), None if delta[0] is None else torch.cat(delta, dim=2)


class TapedAnchor(Anchor):
    """With the way back written out (memory_models.TapedWeights)."""

    def __init__(self, anchor, chunks):
        super().__init__(anchor, chunks)
        self.root = chunks.keys

    def matmul(self, x, name):
        def back(dy):
            self.record(name, x, dy)
            return 0.0 if x is self.root else self.backward(dy, name)  # nobody asks for the gradient of the keys

        return self.forward(x, name), back

    def mul(self, x, name):
        def back(dy):
            self.record(name, x, dy)
            return self.scaled(dy, name)

        return self.scaled(x, name), back


class GhostAnchor(Anchor):
    """Remembers each product's output, for autograd to give its gradient (memory_models.Weights)."""

    def __init__(self, anchor, chunks):
        super().__init__(anchor, chunks)
        if self.residual is not None and chunks.keys.is_inference():
            # autograd takes no inference tensors: copies of the entries, built
            m, self.mix = len(chunks), ordinary(self.mix)
            entries = {k: ordinary(self.residual.entries(k, self.first, m)) for k in anchor}
            self.residual = ResidualSource(built_run(entries, self.first))
        self.used: list[tuple[str, Tensor, Tensor]] = []

    def _remember(self, name, x, z):
        z = z if z.requires_grad else z.detach().requires_grad_()
        self.used.append((name, x, z))
        return z

    def matmul(self, x, name):
        return self._remember(name, x, self.forward(x, name))

    def mul(self, x, name):
        return self._remember(name, x, self.scaled(x, name))


class OffsetAnchor(GhostAnchor):
    """Adds an offset to each product's output, as long as there are any."""

    def __init__(self, anchor, chunks, offsets: Sequence[Tensor]):
        super().__init__(anchor, chunks)
        self.offsets = offsets

    def _remember(self, name, x, z):
        z = z + self.offsets[len(self.used)] if self.offsets else z
        self.used.append((name, x, z))
        return z


def through(x: Tensor, weight: Tensor) -> Tensor:
    """x [B m p d] @ weight [B d e]."""
    return (x.flatten(1, 2) @ weight).unflatten(1, x.shape[1:3])


def upcast(x: Tensor | None) -> Tensor | None:
    return x.float() if x is not None and x.dtype in (torch.bfloat16, torch.float16) else x


def scaled(a: Tensor, delta: Tensor, factor: Tensor | float) -> tuple[Tensor, Tensor]:
    """(a, delta) with each chunk's product times factor [B m], taken on the narrower side."""
    if isinstance(factor, Tensor):
        factor = factor[:, :, None, None]
    return (a * factor, delta) if a.shape[-1] <= delta.shape[-1] else (a, delta * factor)


def built_surprise(a: Tensor, delta: Tensor | None, scale: Tensor | None) -> Tensor:
    """Minus each chunk's gradient, times scale [B m]: [B m d e], or [B m d] of a vector (delta None)."""
    factor = -1.0 if scale is None else -scale
    if delta is None:
        return a.sum(dim=2) * (factor if scale is None else factor.unsqueeze(-1))
    a, delta = scaled(a, delta, factor)
    return a.transpose(-1, -2) @ delta


def vector_path(c: Coefficients, memory: Tensor, momentum: Sequence[Tensor] | None, a: Tensor, scale: Tensor | None):
    """A vector [B d]: every entry by one product of the coefficients with the chunks' gradients, a [B m p d] summed."""
    grads = a.sum(dim=2) if scale is None else a.sum(dim=2) * scale.unsqueeze(-1)
    out = c.memory_start.unsqueeze(-1) * memory.unsqueeze(1) - c.memory_surprise @ grads
    for weight, s in zip(c.memory_carry, momentum or (), strict=False):
        out = out + weight.unsqueeze(-1) * s.unsqueeze(1)

    def gradient(weights, base):
        out = -(weights.unsqueeze(1) @ grads).squeeze(1)
        return out if base is None else base + out

    return BuiltPath(out), lambda: final_momentum(c, momentum, gradient)


def final_momentum(c: Coefficients, momentum: Sequence[Tensor] | None, add_gradient) -> tuple[Tensor, ...]:
    """S^1_m .. S^o_m, each [B ...]; add_gradient(weights [B m], base): base less the gradients' weighted sum."""
    outs = []
    for carry, surprise in zip(c.momentum_carry, c.momentum_surprise, strict=True):
        base = None
        for weight, s in zip(carry, momentum or (), strict=False):
            carried = weight.view(-1, *(1,) * (s.ndim - 1)) * s
            base = carried if base is None else base + carried
        outs.append(add_gradient(surprise, base))
    return tuple(outs)
