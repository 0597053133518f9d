"""The chunkwise engine: for memory networks made of matrix products, and rules with a closed form (TitansRule).

One forward and one backward pass of the network at the mini-batch start weights, batched over all tokens of a window,
give for each weight its inputs a and the gradients delta of its outputs. Every chunk's surprise is a product of a and
delta. The fast weights after each chunk are sums of surprises with the window's coefficients (ops/coefficients.py).
They are applied without being built, or built, whichever costs less (plan.py). Where the network is one matrix, a
window holds several mini-batches: their errors are the solution of one triangular system (ops/exact_errors.py).
Derivation: docs/fast_path.md.

Letters: B rows (batch and heads), m chunks, p pairs per chunk, G read groups, r queries per group, d and e the sides of
a weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from titans_pytorch.ops.coefficients import Coefficients, Transition, coefficients
from titans_pytorch.ops.exact_errors import exact_errors
from titans_pytorch.ops.modes import (
    at_least_float32,
    eager,
    enable_inner_grad,
    in_transform,
    inner_gradients,
    ordinary,
)
from titans_pytorch.ops.newton_schulz import newton_schulz
from titans_pytorch.ops.positions import Rows, chunks_of_first, larger, mini_batches
from titans_pytorch.ops.scan import scan
from titans_pytorch.rules.base import UpdateRule, clamp_scale
from titans_pytorch.rules.rates import WriteRates, skip_below_threshold, skip_pairs
from titans_pytorch.rules.titans import TitansRule

from .base import Carry, Chunks, Engine, Tensors, Window
from .plan import SOLVE_TOKENS, Plan, plan
from .recurrence import combined_update, on_active, where_active
from .weight_paths import BuiltPath, DualPath, Path, carried_product, weighted_gradient
from .written import EarlierLayer, given_entries

LONG = 4096  # tokens of a window under torch.compile


class ChunkwiseEngine(Engine):
    """Chunkwise parallel.

    Args:
        model: a network with `with_vjp` or `with_weights` (memory_models.py).
        rule: how the fast weights change.
        has_vjp: whether the network has `with_vjp`; else autograd differentiates it (per-example gradients).
        form: "dual" never builds a weight, "matrix" builds one per chunk, "solve" writes several mini-batches in one
            window, "auto" counts operations (plan.py).
        use_accelerated_scan: scan built weights with the accelerated-scan kernel, where it runs.
    """

    def __init__(self, model, rule: TitansRule, has_vjp: bool, form: str = "auto", use_accelerated_scan: bool = False):
        super().__init__(model, rule)
        self.rule: TitansRule = rule
        self.has_vjp, self.form, self.use_accelerated_scan = has_vjp, form, use_accelerated_scan
        self.shapes = tuple(tuple(p.shape) for p in model.parameters() if p.ndim == 2)
        self.unsolved = unsolved(model, rule) if form in ("auto", "solve") else f'engine="{form}"'

    def plan(self, chunks: Chunks, mini_batch: int) -> Plan:
        rows, count, pairs, _ = chunks.keys.shape
        reason = self.unsolved
        if not reason and chunks.threshold is not None:
            reason = "surprise_threshold: whether a pair is written depends on the pairs before"
        if not reason and mini_batch < count and (self.form == "solve" or mini_batch * pairs < SOLVE_TOKENS):
            most = larger(1, SOLVE_TOKENS // pairs)
            return Plan(most // mini_batch * mini_batch or most, dual=True, solve=True)
        return replace(self._plan(rows, count, pairs, mini_batch), unsolved=reason or "mini-batches are long enough")

    def _plan(self, rows: int, count: int, pairs: int, mini_batch: int) -> Plan:
        """For windows of one mini-batch."""
        form = "spectral" if self.rule.spectral_norm else "auto" if self.form == "solve" else self.form
        if torch.compiler.is_compiling():  # one plan for all lengths
            most = LONG // pairs
            return plan(self.shapes, 1, min(mini_batch, most) if isinstance(mini_batch, int) else most, pairs, form)
        shapes = () if count == 1 and form == "auto" else self.shapes
        return plan(shapes, rows, min(mini_batch, count), pairs, form)

    def window(self, chunks: Chunks, carry: Carry, plan: Plan) -> Window:
        loss, products = self._surprise(chunks, carry.start)
        rates = skip_below_threshold(chunks.rates, loss, chunks.threshold)
        c = None
        restarts = chunks.initial is not None  # then the window is one chunk
        if (plan.dual or len(chunks) > 1) and not restarts:  # one chunk is built as it is
            momentum, combine = (x if x is None else at_least_float32(x) for x in (rates.momentum, rates.combine))
            c = coefficients(at_least_float32(rates.retention), momentum, combine, rates.active)
        paths, finals = {}, {}
        for index, name in enumerate(carry.start):
            modulation = None if rates.modulation is None else rates.modulation[..., index]
            carried = None if carry.slots is None else chunks.restarted_slots(carry.slots[name], None)
            before = carry.weights[name]
            weights = chunks.restarted(name, before)
            dual = plan.dual and before.ndim == 3 and not restarts
            path, finals[name] = self._path(products[name], weights, carried, modulation, rates, c, dual)
            if restarts:
                path = BuiltPath(torch.stack((before, path.entry(1)), dim=1))
            paths[name] = path
        return Window(chunks.first, len(chunks), paths, lambda name: finals[name](), loss, rates.learning_rate)

    def solve(self, chunks: Chunks, carry: Carry, mini_batch: int, transition: Tensor | None) -> Window:
        rates, name = chunks.rates, self.model.matrix
        starts, ends = mini_batches(chunks.first, len(chunks), mini_batch, chunks.keys.device)
        blend = None if transition is None else Transition(transition, starts, ends)
        momentum, combine = (x if x is None else at_least_float32(x) for x in (rates.momentum, rates.combine))
        c = coefficients(at_least_float32(rates.retention), momentum, combine, rates.active, blend, rates.resets)
        start, slots = carry.start[name], None if carry.slots is None else carry.slots[name]
        carried = [(c.memory_start, carry.weights[name]), *zip(c.memory_carry, slots or (), strict=False)]
        if c.memory_anchor is not None:
            carried.append((c.memory_anchor, chunks.restarted(name, start)))
        if c.memory_initial is not None and chunks.initial is not None:
            carried.append((c.memory_initial, chunks.initial[name]))
        scale = None if rates.modulation is None else rates.modulation[..., 0]
        surprise = c.memory_surprise if scale is None else c.memory_surprise * scale.unsqueeze(1)

        keys, steps = self.model.features(chunks.keys), rates.learning_rate * (2.0 / chunks.values.shape[-1])
        rows = slice(0, len(chunks)) if mini_batch == 1 else starts
        errors = chunks.values - self._known(chunks, keys, carried, start, rows, mini_batch)
        at_start = surprise[:, rows]
        if rates.start_scale is not None:
            at_start = at_start * rates.start_scale.unsqueeze(-1)
        if rates.resets is not None:
            at_start = at_start.masked_fill(rates.resets.unsqueeze(-1), 0.0)
        errors = exact_errors(keys, errors, steps, at_start)
        delta = -steps.unsqueeze(-1) * errors

        def gradient(shares, base):
            return weighted_gradient(-shares if scale is None else -shares * scale, keys, delta, base)

        paths = {name: DualPath(carried, keys, delta, -surprise)}
        loss = errors.square().mean(dim=-1)
        finals = partial(final_momentum, c, slots, gradient)
        return Window(chunks.first, len(chunks), paths, lambda _: finals(), loss, rates.learning_rate, solved=True)

    def _known(self, chunks: Chunks, keys: Tensor, carried, start: Tensor, rows: Rows, mini_batch: int) -> Tensor:
        """Return what carried weights and an earlier layer's say to a window's keys [B m p d]: [B m p e]."""
        own, resets = chunks_of_first(chunks.first, len(chunks), mini_batch), chunks.rates.resets
        if resets is not None:  # those chunks are written at the initial weights
            start, before = chunks.restarted(self.model.matrix, start), carried
            carried = [(share[:, :-1].masked_fill(resets, 0.0), weight) for share, weight in before[:-1]]
            share, initial = before[-1]
            carried.append((torch.where(resets, 1.0, share[:, :-1]), initial))
        if start is carried[0][1] or own == len(chunks):
            known = through(keys, start) if own == len(chunks) else carried_product(keys, rows, carried)
        else:  # the first chunks' mini-batch began before the window, at other weights
            rows = slice(own, len(chunks)) if isinstance(rows, slice) else rows[own:]
            known = torch.cat((through(keys[:, :own], start), carried_product(keys[:, own:], rows, carried)), dim=1)
        if chunks.rates.start_scale is not None:
            known = known * chunks.rates.start_scale[:, :, None, None]
        if chunks.residual is None:
            return known
        assert chunks.rates.residual_mix is not None
        earlier = chunks.residual.matmul(keys, self.model.matrix, chunks.first)
        return known + chunks.rates.residual_mix[:, :, None, None] * earlier

    def read(self, paths: Mapping[str, Path], queries: Tensor, rows: Rows) -> Tensor:
        return self.model.with_weights(queries, WeightsOfEntries(paths, rows))

    def _path(self, product, weights: Tensor, momentum: Sequence[Tensor] | None, modulation, rates, c, dual: bool):
        """A parameter's fast weights through the window, and a function that builds its momentum after it."""
        a, delta = product
        scale = self._scale(a, delta, modulation)
        if weights.ndim == 2 and c is not None:
            return vector_path(c, weights, momentum, a, scale)
        if not dual:
            return self._built_path(built_surprise(a, delta, scale), weights, momentum, rates)
        surprise = -c.memory_surprise if scale is None else -c.memory_surprise * scale.unsqueeze(1)

        def gradient(shares, base):
            return weighted_gradient(-shares if scale is None else -shares * scale, a, delta, base)

        carried = [(c.memory_start, weights), *zip(c.memory_carry, momentum or (), strict=False)]
        return DualPath(carried, a, delta, surprise), lambda: final_momentum(c, momentum, gradient)

    def _built_path(self, surprise: Tensor, weights: Tensor, momentum: Sequence[Tensor] | None, rates: WriteRates):
        """Build every entry from the chunks' surprises [B m ...]: one pass per recurrence."""

        def recur(gate, x, start):
            return scan(gate, x, start, self.use_accelerated_scan)

        update, final = combined_update(surprise, rates, momentum, recur)
        if self.rule.spectral_norm and weights.ndim == 3:
            update = on_active(newton_schulz, update, rates.active_rows)
        gate, update = where_active(rates.active, rates.retention, update)
        entries = scan(gate, update, weights, self.use_accelerated_scan, with_start=True)
        return BuiltPath(entries), lambda: final

    def _scale(self, a, delta, modulation: Tensor | None) -> Tensor | None:
        """The factor of each chunk's gradient [B m]: that of the clamp, times the modulation."""
        if self.rule.max_grad_norm is None:
            return modulation
        if delta is None:
            square = a.sum(dim=2).square().sum(dim=-1)
        else:  # |a^T delta|^2 without building a^T delta
            square = ((a @ a.transpose(-1, -2)) * (delta @ delta.transpose(-1, -2))).sum(dim=(-1, -2))
        clamp = clamp_scale(square, self.rule.max_grad_norm)
        return clamp if modulation is None else clamp * modulation

    def _surprise(self, chunks: Chunks, start: Tensors):
        """The inner loss of each pair [B m p], and of each matrix (a, delta), of a vector (gradient per pair, None)."""
        if not self.has_vjp:
            return self._surprise_by_autograd(chunks, start)
        weights = StartWeightsWithVjp(start, chunks)
        prediction, back = self.model.with_vjp(chunks.keys, weights)
        rates = chunks.rates
        loss, slope = self.rule.loss_and_slope(
            prediction, chunks.values, rates.learning_rate, chunks.threshold, *rates.bounds
        )
        if not stands_still(chunks, loss):
            back(slope)
        return loss, weights.products()

    @eager
    def _surprise_by_autograd(self, chunks: Chunks, start: Tensors):
        """For networks without `with_vjp`: one call of autograd gives the gradient of every product's output."""
        if in_transform():
            return self._surprise_by_offsets(chunks, start)
        differentiable = torch.is_grad_enabled()
        with enable_inner_grad():
            weights = StartWeightsForAutograd({k: ordinary(v) for k, v in start.items()}, chunks)
            prediction = self.model.with_weights(ordinary(chunks.keys), weights)
            loss = self.rule.loss(prediction, ordinary(chunks.values), *map(ordinary, chunks.rates.bounds))
            if not differentiable and stands_still(chunks, loss.detach()):
                return loss.detach(), weights.products()
            total = (loss * skip_pairs(ordinary(chunks.rates.learning_rate), loss, chunks.threshold)).sum()
            deltas = torch.autograd.grad(
                total, [z for _, _, z in weights.used], create_graph=differentiable, materialize_grads=True
            )
        for (name, x, _), delta in zip(weights.used, deltas, strict=True):
            weights.record(name, x, delta)
        return loss, weights.products()

    def _surprise_by_offsets(self, chunks: Chunks, start: Tensors):
        """The same for torch.func, which differentiates with respect to arguments only: to offsets of the outputs."""

        def products(offsets: Sequence[Tensor]) -> tuple[StartWeightsWithOffsets, Tensor]:
            weights = StartWeightsWithOffsets(start, chunks, offsets)
            return weights, self.model.with_weights(chunks.keys, weights)

        def total(offsets: tuple[Tensor, ...]):
            weights, prediction = products(offsets)
            loss = self.rule.loss(prediction, chunks.values, *chunks.rates.bounds)
            learning_rate = skip_pairs(chunks.rates.learning_rate, loss, chunks.threshold)
            return (loss * learning_rate).sum(), (loss, tuple(x for _, x, _ in weights.used))

        weights, _ = products(())
        zeros = tuple(torch.zeros_like(z) for _, _, z in weights.used)
        deltas, (loss, inputs) = inner_gradients(total, lambda: zeros)
        for (name, _, _), x, delta in zip(weights.used, inputs, deltas, strict=True):
            weights.record(name, x, delta)
        return loss, weights.products()


def stands_still(chunks: Chunks, loss: Tensor) -> bool:
    """Return whether none of the chunks changes anything, so that their gradients need not be taken. It is looked at on
    the CPU alone, where the answer is there at once, and never where it would be traced.
    """
    if loss.device.type != "cpu" or loss.requires_grad or torch.compiler.is_compiling() or in_transform():
        return False
    active = skip_below_threshold(chunks.rates, loss, chunks.threshold).active
    return active is not None and not active.any()


class WeightsOfEntries:
    """`Weights` for a read: each read group has the parameters of the entry it reads."""

    def __init__(self, paths: Mapping[str, Path], rows: Rows):
        self.paths, self.rows = paths, rows

    def matmul(self, x, name):
        return self.paths[name].matmul(x, self.rows)

    def mul(self, x, name):
        return self.paths[name].mul(x, self.rows)


class StartWeights:
    """The weights at which surprises are computed: the mini-batch start weights, plus a share of an earlier layer's
    fast weights (applied, not built). Records what the surprises are made of."""

    def __init__(self, start: Tensors, chunks: Chunks):
        self.start, self.first, self.residual = start, chunks.first, chunks.residual
        scale = chunks.rates.start_scale
        self.scale = None if scale is None else scale[:, :, None, None]
        if chunks.rates.residual_mix is not None:
            self.mix = chunks.rates.residual_mix[:, :, None, None]
        self._records: dict[str, list] = {name: [] for name in start}
        self._empty = chunks.keys[:, :, :0]

    def forward(self, x: Tensor, name: str) -> Tensor:
        y = self._start_scaled(through(x, self.start[name]))
        return y if self.residual is None else y + self.mix * self.residual.matmul(x, name, self.first)

    def backward(self, dy: Tensor, name: str) -> Tensor:
        dx = self._start_scaled(through(dy, self.start[name].transpose(-1, -2)))
        return dx if self.residual is None else dx + self.mix * self.residual.matmul_t(dy, name, self.first)

    def scaled(self, x: Tensor, name: str) -> Tensor:
        y = self._start_scaled(x * self.start[name][:, None, None])
        return y if self.residual is None else y + self.mix * self.residual.mul(x, name, self.first)

    def _start_scaled(self, y: Tensor) -> Tensor:
        return y if self.scale is None else y * self.scale

    def record(self, name: str, a: Tensor, delta: Tensor):
        self._records[name].append((a, delta) if self.start[name].ndim == 3 else (a * delta, None))

    def products(self):
        """name -> (a [B m p d], delta [B m p e]), or (gradient [B m p d], None) of a vector."""
        return {name: self._join(name, uses) for name, uses in self._records.items()}

    def _join(self, name: str, uses):
        """A parameter used twice has the pairs of both uses; one that is not used has none."""
        if not uses:
            sides = self.start[name].shape[1:]
            blank = [self._empty.new_zeros(*self._empty.shape[:3], side) for side in sides]
            return (blank[0], blank[1] if len(sides) == 2 else None)
        if len(uses) == 1:
            return uses[0]
        a, delta = zip(*uses, strict=True)
        return torch.cat(a, dim=2), None if delta[0] is None else torch.cat(delta, dim=2)


class StartWeightsWithVjp(StartWeights):
    """Every product returns its vector-Jacobian product (memory_models.TapedWeights)."""

    def __init__(self, start, chunks):
        super().__init__(start, chunks)
        self.keys = chunks.keys

    def matmul(self, x, name):
        def back(dy):
            self.record(name, x, dy)
            return 0.0 if x is self.keys else self.backward(dy, name)  # the gradient of the keys is not needed

        return self.forward(x, name), back

    def mul(self, x, name):
        def back(dy):
            self.record(name, x, dy)
            return self.scaled(dy, name)

        return self.scaled(x, name), back


class StartWeightsForAutograd(StartWeights):
    """Keeps the output of every product, so that autograd can return its gradient (memory_models.Weights)."""

    def __init__(self, start, chunks):
        super().__init__(start, chunks)
        if self.residual is not None and chunks.keys.is_inference():
            # autograd refuses inference tensors: copy the entries, built
            m, self.mix = len(chunks), ordinary(self.mix)
            entries = {k: ordinary(self.residual.entries(k, self.first, m)) for k in start}
            self.residual = EarlierLayer(given_entries(entries, self.first))
        if self.scale is not None:
            self.scale = ordinary(self.scale)
        self.used: list[tuple[str, Tensor, Tensor]] = []

    def _keep(self, name, x, z):
        z = z if z.requires_grad else z.detach().requires_grad_()
        self.used.append((name, x, z))
        return z

    def matmul(self, x, name):
        return self._keep(name, x, self.forward(x, name))

    def mul(self, x, name):
        return self._keep(name, x, self.scaled(x, name))


class StartWeightsWithOffsets(StartWeightsForAutograd):
    """Adds an offset to the output of every product, while there are any."""

    def __init__(self, start, chunks, offsets: Sequence[Tensor]):
        super().__init__(start, chunks)
        self.offsets = offsets

    def _keep(self, name, x, z):
        z = z + self.offsets[len(self.used)] if self.offsets else z
        self.used.append((name, x, z))
        return z


def unsolved(model, rule: TitansRule) -> str:
    """Return why errors of several mini-batches are not the solution of one linear system; empty where they are."""
    if getattr(model, "matrix", None) is None:
        return "the memory network is not one matrix (MemoryMLP of depth 1) without mem_model_norm_add_residual"
    own_loss = type(rule).loss is not UpdateRule.loss or type(rule).loss_and_slope is not UpdateRule.loss_and_slope
    if rule.loss_fn is not None or own_loss:
        return "store_memory_loss_fn"
    if rule.max_grad_norm is not None:
        return "max_grad_norm"
    return "spectral_norm_surprises" if rule.spectral_norm else ""


def through(x: Tensor, weight: Tensor) -> Tensor:
    """x [B m p d] @ weight [B d e]."""
    return (x.flatten(1, 2) @ weight).unflatten(1, x.shape[1:3])


def scaled(a: Tensor, delta: Tensor, factor: Tensor | float) -> tuple[Tensor, Tensor]:
    """(a, delta) with each chunk's product times factor [B m], taken on the narrower side."""
    if isinstance(factor, Tensor):
        factor = factor[:, :, None, None]
    return (a * factor, delta) if a.shape[-1] <= delta.shape[-1] else (a, delta * factor)


def built_surprise(a: Tensor, delta: Tensor | None, scale: Tensor | None) -> Tensor:
    """Minus each chunk's gradient, times scale [B m]: [B m d e], or [B m d] of a vector (delta None)."""
    if delta is None:
        return -a.sum(dim=2) if scale is None else a.sum(dim=2) * -scale.unsqueeze(-1)
    a, delta = scaled(a, delta, -1.0 if scale is None else -scale)
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
