"""Scores of the step from each token to the next: twist, phase and codebook.

Letters: b batch, n tokens, d features, p phase pairs, s codebook entries. A step has n - 1 entries, one for each token
except the first. Where a norm or an absolute value has no derivative (repeated tokens, tokens on one ray, zero tokens),
its gradient is zero. This includes values within rounding: at a moment of 1e-17 the slope of the norm is noise.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

UNIT_EPS = 1e-12


def moved(x: Tensor) -> Tensor:
    """Return True where a token differs from the one before. [b n d] -> bool [b n-1 1].

    Matrix products round equal rows differently, depending on their position. Without this mask a constant sequence
    would score about 1e-16 instead of 0, and differently for each way of cutting it into calls.
    """
    return (x[:, 1:] != x[:, :-1]).any(dim=-1, keepdim=True)


def rounding(dtype: torch.dtype) -> float:
    """Return a bound on the difference of two numbers of size one that differ by the order of summation alone."""
    return 64 * torch.finfo(dtype).eps


def safe_norm(x: Tensor, floor: float = 0.0) -> Tensor:
    """Return the norm over the last dim, which is kept. Up to `floor` it is 0 with gradient 0; second derivatives are
    finite.
    """
    square = x.square().sum(dim=-1, keepdim=True)
    at_zero = square <= floor**2
    return torch.where(at_zero, 1.0, square).sqrt().masked_fill(at_zero, 0.0)


def unit_norm(x: Tensor) -> Tensor:
    """Return x / max(norm, 1e-12) over the last dim; 0 stays 0, with gradient 0."""
    square = x.square().sum(dim=-1, keepdim=True)
    return x * square.clamp(min=UNIT_EPS**2).rsqrt().masked_fill(square == 0, 0.0)


def twist_moment(q: Tensor, k: Tensor) -> Tensor:
    """Return q_t * k_{t-1} - q_{t-1} * k_t, a symplectic form for each feature. [b n d] -> [b n-1 d]."""
    return q[:, 1:] * k[:, :-1] - q[:, :-1] * k[:, 1:]


def polar(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Return radius and angle in [-pi, pi] of interleaved pairs (cosine part, sine part). [b n 2p] -> twice [b n p].

    A pair at zero has radius 0 and angle 0.
    """
    pairs = pairs.unflatten(-1, (-1, 2))
    radius = safe_norm(pairs).squeeze(-1)
    cosine, sine = pairs.unbind(dim=-1)
    return radius, torch.atan2(sine, cosine).masked_fill(radius == 0, 0.0)


def phase_step(angle: Tensor) -> Tensor:
    """Return the mean over pairs of the angle between tokens, wrapped, over pi: in [0, 1]. [b n p] -> [b n-1 1]."""
    step = angle[:, 1:] - angle[:, :-1]
    turn = (step - 2 * math.pi * (step / (2 * math.pi)).round()).abs() / math.pi
    kink = torch.minimum(turn, 1 - turn) <= rounding(turn.dtype)
    return torch.where(kink, turn.detach(), turn).mean(dim=-1, keepdim=True).clamp(max=1.0)


def codebook_step(assignment: Tensor) -> Tensor:
    """Return the total variation between assignments of consecutive tokens, in [0, 1]. [b n s] -> [b n-1 1]."""
    difference = assignment[:, 1:] - assignment[:, :-1]
    return (0.5 * difference.abs().sum(dim=-1, keepdim=True)).clamp(max=1.0)


def per_token(step: Tensor, n: int) -> Tensor:
    """Return the score of each step as the score of its second token; the first token has 0. [b n-1 d] -> [b n d]."""
    return F.pad(step, (0, 0, 1, 0))[:, :n]
