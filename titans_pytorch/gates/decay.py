"""Complexity lowers the forget gate: complex chunks remove less of the fast weights.

    forget gate of a chunk *= 1 - scale * complexity,    complexity the largest over the chunk's tokens, scale learned

Letters as in `stages`.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from einops import repeat
from torch import Tensor, nn

from titans_pytorch.common.checks import Words, wrong
from titans_pytorch.gates.dmd import windowed_dmd_error
from titans_pytorch.gates.stages import Gated, Score, Span, Stage


class ScoreOf(Protocol):
    """Scores the complexity of a span's tokens, given `context` earlier tokens, or all if there are fewer."""

    def context(self, gates, chunk: int) -> int: ...

    def scale(self, gates) -> Tensor: ...

    def __call__(self, gates, span: Span, earlier: Tensor) -> Score: ...


@dataclass(frozen=True)
class GateScore:
    """The scores of the module `gates.symplectic_gate`. phase: also request its manifold state.

    The module is called once for each mini-batch of the span, on its tokens preceded by the context. A module with
    `causal = True` is called once for the whole span, because later tokens change none of its scores.
    """

    phase: bool = False

    def context(self, gates, chunk):
        return context_of(gates.symplectic_gate)

    def scale(self, gates):
        return gates.symplectic_complexity_scale

    def __call__(self, gates, span, earlier):
        gate, context = gates.symplectic_gate, self.context(gates, span.chunk)
        tokens, k = _after(earlier, context, span)
        if getattr(gate, "causal", False):
            return self._of(gate, tokens, k, span.chunk)
        parts = []
        for first, end in span.parts():
            first, end = k + first * span.chunk, k + end * span.chunk
            seen = min(first, context)
            parts.append(self._of(gate, tokens[:, first - seen : end], seen, span.chunk))
        scores, angles = zip(*parts, strict=True)
        return Score(torch.cat(scores, dim=1), None if any(a is None for a in angles) else torch.cat(angles, dim=1))

    def _of(self, gate: nn.Module, tokens: Tensor, earlier: int, chunk: int) -> Score:
        if not self.phase:
            return Score(_own(gate(tokens), "complexity", tokens, earlier, chunk).squeeze(-1))
        out = gate(tokens, return_manifold_state=True)
        if not isinstance(out, tuple) or len(out) != 2:
            got = Words(f"{type(out).__name__} from return_manifold_state = True")
            raise wrong("symplectic_gate", got, "(complexity, manifold state or None)")
        complexity, manifold = out
        complexity = _own(complexity, "complexity", tokens, earlier, chunk).squeeze(-1)
        if manifold is None:
            return Score(complexity)
        angles = manifold.get("phase_angle") if isinstance(manifold, dict) else None
        angles = _own(angles, "phase_angle", tokens, earlier, chunk).detach()
        return Score(complexity, circular_mean(angles.flatten(2)))


@dataclass(frozen=True)
class DmdScore:
    """The tanh of the DMD error over the last `window` tokens, at the end of each chunk."""

    window: int

    def context(self, gates, chunk):
        return max(0, self.window - chunk)

    def scale(self, gates):
        return gates.dmd_complexity_scale

    def __call__(self, gates, span, earlier):
        tokens, k = _after(earlier, self.context(gates, span.chunk), span)
        return Score(windowed_dmd_error(tokens, self.window, span.chunk, context=k).tanh().unsqueeze(-1))


@dataclass(frozen=True)
class MeanScore:
    """The mean of both scores, with the mean of both scales."""

    gate: GateScore
    dmd: DmdScore

    def context(self, gates, chunk):
        return max(self.gate.context(gates, chunk), self.dmd.context(gates, chunk))

    def scale(self, gates):
        return (self.gate.scale(gates) + self.dmd.scale(gates)) / 2

    def __call__(self, gates, span, earlier):
        gate, dmd = self.gate(gates, span, earlier), self.dmd(gates, span, earlier)
        return gate._replace(tokens=(gate.tokens + dmd.tokens) / 2)


@dataclass(frozen=True)
class DecayGate(Stage):
    """The stage that scores a span and lowers the forget gates of its chunks."""

    score: ScoreOf

    def __call__(self, gates, span: Span, gated: Gated) -> Gated:
        earlier = gated.carry.gate_tokens
        earlier = span.tokens[:, :0] if earlier is None else earlier
        score = self.score(gates, span, earlier)
        share = between_0_and_1(self.score.scale(gates)) * score.chunk
        share = share.clamp(0.0, 1.0)  # a user's gate may leave [0, 1]
        keep = gated.rates.retention
        keep = keep + (1.0 - keep) * repeat(share, "b m -> (b h) m", h=gates.internal_heads).to(keep.dtype)
        tokens = torch.cat((earlier.to(span.tokens.dtype), span.tokens), dim=1)
        tokens = last_tokens(tokens, self.score.context(gates, span.chunk))
        return gated._replace(
            rates=replace(gated.rates, retention=keep),
            carry=gated.carry._replace(gate_tokens=tokens.clone()),
            score=score,
        )


def context_of(gate: nn.Module) -> int:
    """Return the number of earlier tokens that the gate needs; 1 if it has no `context`."""
    context = getattr(gate, "context", 1)
    if isinstance(context, bool) or not isinstance(context, int) or context < 0:
        takes = "an integer of at least 0; a budget over the whole sequence has none: give it a budget_window"
        raise wrong("symplectic_gate.context", context, takes)
    return context


def between_0_and_1(x: Tensor) -> Tensor:
    """Clamp x to [0, 1] with the gradient of the identity, so that training can bring back a value outside. (A gradient
    masked by its sign would depend on how a sequence is cut into calls.)
    """
    return x + (x.clamp(0.0, 1.0) - x).detach()


def circular_mean(angles: Tensor) -> Tensor:
    """Return the angle of the mean of unit vectors, in [-pi, pi]: [.. n] -> [..]."""
    return torch.atan2(angles.sin().mean(dim=-1), angles.cos().mean(dim=-1))


def last_tokens(tokens: Tensor, count: int) -> Tensor:
    """Return the last `count` tokens of [b n d], or all if there are fewer."""
    n = tokens.shape[1]
    return tokens[:, n - min(n, count) :]


def _after(earlier: Tensor, context: int, span: Span) -> tuple[Tensor, int]:
    """Return up to `context` earlier tokens followed by the span's tokens, and the number of earlier ones."""
    earlier = last_tokens(earlier, context)
    k = earlier.shape[1]
    return (torch.cat((earlier.to(span.tokens.dtype), span.tokens), dim=1) if k else span.tokens), k


def _own(values, what: str, tokens: Tensor, earlier: int, chunk: int) -> Tensor:
    """Check a gate's values of all tokens and drop those of the earlier tokens: [b k+m*c x] -> [b m c x]."""
    b, n, _ = tokens.shape
    width = "1" if what == "complexity" else "pairs"
    right = isinstance(values, Tensor) and values.ndim == 3 and values.shape[:2] == (b, n)
    if not right or (width == "1" and values.shape[-1] != 1):
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        takes = f"{what} [b n {width}] of tokens {tuple(tokens.shape)}"
        raise wrong("symplectic_gate", Words(f"a module that gives {what} of {got}"), takes)
    return values[:, earlier:].unflatten(1, (-1, chunk))
