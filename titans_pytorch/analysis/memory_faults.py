"""Find the chunk, head, parameter and rate at which the fast weights of a memory stop being finite.

Letters: B rows (batch and heads), m chunks, p key-value pairs per chunk, d features of a head.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from titans_pytorch.analysis.not_finite import NotFinite, finite, not_finite
from titans_pytorch.engines.base import Carry, Chunks, Tensors, Window
from titans_pytorch.engines.plan import Plan
from titans_pytorch.engines.sequential import SequentialEngine
from titans_pytorch.engines.written import blended
from titans_pytorch.memory.rates import SigmoidStep
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.ops.positions import ends_mini_batch
from titans_pytorch.rules.base import UpdateRule

__all__ = ["MemoryFault"]

OVERSHOOTS = 2.0  # a gain above it overshoots: see overshoot.py


@dataclass(frozen=True)
class MemoryFault:
    """Where in a memory a value was not finite first.

    memory: name of the NeuralMemory in its model.
    what: "key", "value", "learning rate", "momentum", "retention", "modulation", "momentum mixture", "residual
        mixture", "inner loss", "gradient of the inner loss", "carried momentum", "fast weight", "fast weight at the
        start" (of the chunk), or "gradient of" one of these.
    chunk: absolute index of the store chunk.
    tokens: positions of the chunk's first and last token, or twice that of the one token.
    row: row of the batch.
    head: head of the memory (page * heads + head with pages).
    parameter: parameter of the memory network; None where all share it.
    rate: the rate that caused it, "learning rate", "modulation", "momentum" or "retention"; None: none of them.
    remedy: what to change; empty where nothing in the memory is to blame.
    """

    memory: str
    what: str
    chunk: int
    tokens: tuple[int, int]
    row: int
    head: int
    parameter: str | None = None
    rate: str | None = None
    remedy: str = ""

    @property
    def where(self) -> str:
        """Chunk, tokens, row and head, in words."""
        first, last = self.tokens
        tokens = f"token {first}" if first == last else f"tokens {first} to {last}"
        return f"chunk {self.chunk} ({tokens}), row {self.row}, head {self.head}"

    def __str__(self) -> str:
        what = f"{self.what} {self.parameter}" if self.parameter else self.what
        return f"in {self.memory or 'the memory'} the {what} is not finite in {self.where}"


class FaultWatcher:
    """Watches every solve window that the engine of a memory writes.

    Args:
        name: the memory's name in its model.
        memory: a NeuralMemory.
        made: called with a fault that the memory made from finite keys, values and rates.
    """

    def __init__(self, name: str, memory: NeuralMemory, made: Callable[[NotFinite], None]):
        self.name, self.memory, self.made = name, memory, made
        self.forward: MemoryFault | None = None
        self.backward: MemoryFault | None = None
        self.rates: _Rates | None = None

    def at(self, phase: str) -> MemoryFault | None:
        """Return the fault found in a phase of the call."""
        return self.backward if phase == "backward" else self.forward

    @torch.no_grad()
    def wrote(
        self, chunks: Chunks, carry: Carry, window: Window, mini_batch: int | None, transition: Tensor | None
    ) -> None:
        """A solve window was written: see `switches.watched`."""
        for what, x in _given(chunks):
            if x.requires_grad:
                x.register_hook(partial(self._gradient, chunks, what))
        if self.forward is not None:
            return
        self.forward = self._before(chunks, carry) or self._first_given(chunks)
        if self.forward is not None:
            return
        if self._written(chunks, window):
            self.rates = _Rates(self.memory, chunks).joined(self.rates)
        else:
            steps = _steps(self.memory, chunks, carry, mini_batch, transition)
            self.forward, x = self._made(chunks, steps, window)
            what = " ".join(filter(None, (self.forward.what, self.forward.parameter)))
            self.made(not_finite(self.name, type(self.memory).__name__, what, x, "forward"))

    def _written(self, chunks: Chunks, window: Window) -> bool:
        ends = (path.entry(len(chunks)) for path in window.paths.values())
        return (window.loss is None or finite(window.loss)) and all(map(finite, ends))

    def _before(self, chunks: Chunks, carry: Carry) -> MemoryFault | None:
        """Find fast weights that were not finite before the window."""
        for weights in (carry.weights, carry.start):
            for name in weights:
                if not finite(weights[name]):
                    row = _row(weights[name])
                    return self._fault("fast weight at the start", chunks.first, row, parameter=name)
        return None

    def _first_given(self, chunks: Chunks) -> MemoryFault | None:
        """Find the first chunk in which a key, value or rate is not finite."""
        found: MemoryFault | None = None
        for what, x in _given(chunks):
            if not finite(x):
                fault = self._of_given(chunks, what, x, first=True)
                found = fault if found is None or fault.chunk < found.chunk else found
        return found

    def _of_given(self, chunks: Chunks, what: str, x: Tensor, first: bool) -> MemoryFault:
        """Find the first or last chunk of x [B m ...] that is not finite."""
        bad = ~x.isfinite()
        of_chunk = bad.transpose(0, 1).flatten(1).any(dim=1).nonzero().flatten()
        index = int(of_chunk[0 if first else -1])
        place = bad[:, index].nonzero()[0].tolist()
        if what not in ("key", "value", "learning rate"):
            return self._fault(what, chunks.first + index, place[0])
        shift = int(what == "value" and self.memory.chunk_config.lookahead)
        return self._fault(what, chunks.first + index, place[0], token=place[1] // self.memory.kv_per_token + shift)

    def _fault(self, what: str, chunk: int, row: int, *, token: int | None = None, **more: Any) -> MemoryFault:
        """Build a MemoryFault. token: position within the chunk; None: the whole chunk."""
        size, heads = self.memory.store_chunk_size, self.memory.internal_heads
        tokens = (chunk * size, chunk * size + size - 1) if token is None else (chunk * size + token,) * 2
        return MemoryFault(self.name, what, chunk, tokens, row // heads, row % heads, **more)

    def _gradient(self, chunks: Chunks, what: str, grad: Tensor) -> None:
        """Find the chunk of a gradient. The backward pass starts at the end, so the last such chunk comes first."""
        if not finite(grad):
            fault = self._of_given(chunks, what, grad, first=False)
            if self.backward is None or fault.chunk > self.backward.chunk:
                self.backward = MemoryFault(**vars(fault) | {"what": f"gradient of the {what}"})

    def _made(self, chunks: Chunks, steps: "Iterator[Step]", window: Window) -> tuple[MemoryFault, Tensor]:
        """Find the first value that is not finite, chunk by chunk, with its tensor."""
        made = next((step for step in steps if not finite(step[3])), None)
        # None: only this engine's order of sums overflows
        index, what, name, x = made or (len(chunks) - 1, *self._of_window(chunks, window))
        row = _row(x)
        of_window = _Rates(self.memory, chunks.part(0, index + 1)).joined(self.rates)
        rate, remedy = of_window.to_blame(self.memory, row, what)
        fault = self._fault(what, chunks.first + index, row, parameter=name, rate=rate, remedy=remedy)
        return fault, x

    def _of_window(self, chunks: Chunks, window: Window) -> tuple[str, str | None, Tensor]:
        ends = {name: path.entry(len(chunks)) for name, path in window.paths.items()}
        bad = next((name for name, end in ends.items() if not finite(end)), None)
        if bad is None:
            return "inner loss", None, cast(Tensor, window.loss)
        return "fast weight", bad, ends[bad]


def _given(chunks: Chunks) -> Iterator[tuple[str, Tensor]]:
    """Return the inputs of a write: tensors [B m ...]."""
    rates = chunks.rates
    named = {
        "key": chunks.keys,
        "value": chunks.values,
        "learning rate": rates.learning_rate,
        "momentum": rates.momentum,
        "retention": rates.retention,
        "modulation": rates.modulation,
        "momentum mixture": rates.combine,
        "residual mixture": rates.residual_mix,
        "bound of the inner loss": rates.bound,
        "weight of earlier pairs": rates.window,
        "learning rate of a chunk": rates.step,
    }
    for what, x in named.items():
        if x is not None:
            yield what, x


def _row(x: Tensor) -> int:
    """Return the first row of x [B ...] that is not finite."""
    return int((~x.isfinite()).flatten(1).any(dim=1).nonzero()[0])


Step = tuple[int, str, str | None, Tensor]  # (chunk, what, parameter, tensor [B ...])


class _Recorded:
    """An update rule that records the gradients it receives."""

    def __init__(self, rule: UpdateRule):
        self.rule = rule
        self.gradients: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rule, name)

    def surprise(self, gradient: Tensor, modulation: Tensor | None) -> Tensor:
        self.gradients.append(gradient)
        return self.rule.surprise(gradient, modulation)


def _steps(
    memory: NeuralMemory, chunks: Chunks, carry: Carry, mini_batch: int | None, transition: Tensor | None
) -> Iterator[Step]:
    """Yield the steps of a window of one or several mini-batches, in the order of the sequential engine."""
    start, weights, slots = carry.start, carry.weights, carry.slots
    for index in range(len(chunks)):
        rule = _Recorded(memory.engine.rule)
        engine = SequentialEngine(memory.engine.model, cast(UpdateRule, rule))
        part = chunks.part(index, index + 1)
        start = {name: part.restarted(name, weight) for name, weight in start.items()}
        window = engine.window(part, Carry(start, weights, slots), Plan(1, dual=False))
        yield index, "inner loss", None, cast(Tensor, window.loss)
        for name, gradient in zip(carry.start, rule.gradients, strict=True):
            yield index, "gradient of the inner loss", name, gradient
        after: Mapping[str, Any] = {name: tuple(window.final_slots(name)) for name in carry.start}
        for name in carry.start:
            for slot in after[name]:
                yield index, "carried momentum", name, slot
        ends: Tensors = {name: path.entry(1) for name, path in window.paths.items()}
        for name, end in ends.items():
            yield index, "fast weight", name, end
        if ends_mini_batch(chunks.first + index + 1, mini_batch):
            start = ends = {name: blended(start[name], end, transition) for name, end in ends.items()}
        weights, slots = ends, after


class _Rates:
    """Rates of the chunk with the largest gain of each row, over all chunks so far: tensors [B].

    gain: 2 C theta |k|^2 / d times the modulation, C the tokens of a mini-batch (docs/stability.md).
    """

    def __init__(self, memory: NeuralMemory, chunks: Chunks):
        rates, one = chunks.rates, torch.ones_like(chunks.rates.retention)
        tokens = memory.batch_size or memory.store_chunk_size
        gain = 2 * tokens * (rates.learning_rate * chunks.keys.square().mean(dim=-1)).amax(dim=-1)
        modulation = one if rates.modulation is None else rates.modulation.amax(dim=-1)
        momentum = one * 0 if rates.momentum is None else rates.momentum.amax(dim=-1)
        at = (gain * modulation).argmax(dim=1, keepdim=True)

        def there(x: Tensor) -> Tensor:
            return x.gather(1, at).squeeze(1)

        self.gain, self.modulation = there(gain), there(modulation)
        self.momentum, self.retention = there(momentum), there(rates.retention)
        self.step, self.chunk = there(rates.learning_rate.amax(dim=-1)), at.squeeze(1) + chunks.first

    def joined(self, before: "_Rates | None") -> "_Rates":
        """Take the larger gain of each row; the earlier one on a tie."""
        if before is not None and len(before.gain) == len(self.gain):
            older = before.gain * before.modulation >= self.gain * self.modulation
            for name, x in vars(self).items():
                setattr(self, name, torch.where(older, getattr(before, name), x))
        return self

    def to_blame(self, memory: NeuralMemory, row: int, what: str) -> tuple[str | None, str]:
        """Return (rate, what to change) for the first rate that makes a mini-batch of such chunks overshoot."""
        size = f"batch_size = {memory.batch_size}" if memory.batch_size else f"chunk_size = {memory.store_chunk_size}"
        chunk, momentum = int(self.chunk[row]), float(self.momentum[row])
        gain, modulation = float(self.gain[row]), float(self.modulation[row])
        if gain > OVERSHOOTS:
            step = float(self.step[row])
            said = f"the learning rate of chunk {chunk} is {step:.3g}"
            if not isinstance(memory.rates.step_transform, SigmoidStep):
                return "learning rate", f"{said}: bound adaptive_step_transform below 1 / {size}"
            if step * (memory.batch_size or memory.store_chunk_size) > 1:
                remedy = f"lower default_step_transform_max_lr (max_step) below 1 / {size}, with qk_rmsnorm"
                return "learning rate", f"{said}: {remedy}"
            return None, "its keys are large beside its learning rate: set qk_rmsnorm, or check the scale of its inputs"
        if gain * modulation > OVERSHOOTS:
            return "modulation", f"the modulation of chunk {chunk} is {modulation:.3g}: lower max_mem_layer_modulation"
        if momentum and gain * modulation > OVERSHOOTS * (1 - momentum):
            said = f"the momentum of chunk {chunk} is {momentum:.3g}"
            return "momentum", f"{said}: lower init_momentum_bias, or set momentum = False"
        if what in ("fast weight", "carried momentum") and (kept := float(self.retention[row])) > 0.999:
            return "retention", f"the retention of chunk {chunk} is {kept:.4g}: raise init_decay_bias"
        return (
            None,
            "its rates are small: check the scale of its keys, values and initial fast weights",
        )
