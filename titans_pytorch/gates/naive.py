"""SymplecticGating as loops over samples, tokens and features: the slow twin of its tests.

Where a norm or an angle has no gradient, it is zero. Meant for float64.
"""

import math

import torch
from torch import Tensor

from titans_pytorch.gates.scores import rounding


def naive_forward(gate, x: Tensor) -> dict[str, Tensor]:
    """Return every output of `gate`, a SymplecticGating, for tokens x [b n d], by name."""
    rows = [_row(gate, row) for row in x]

    def stacked(name: str) -> Tensor | None:
        values = [value for row in rows if (value := row[name]) is not None]
        return torch.stack(values) if values else None

    return {name: value for name in rows[0] if (value := stacked(name)) is not None}


def naive_top_k(values: list[float], k: int) -> list[bool]:
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    return [i in order[:k] for i in range(len(values))]


def naive_adaptive_k(values: list[float], ratio: float, least: int) -> int:
    mean = sum(abs(v) for v in values) / len(values)
    return max(least, min(len(values), math.ceil(math.tanh(mean) * (ratio * len(values)))))


def _row(gate, tokens: Tensor) -> dict[str, Tensor | None]:
    n, d = tokens.shape
    gated = [_gated(gate, token) for token in tokens]
    x, kept = [pair[0] for pair in gated], [pair[1] for pair in gated]
    moments, phases, books, radii, angles, scores = [], [], [], [], [], []
    for t in range(n):
        still = t == 0 or bool((tokens[t] == tokens[t - 1]).all())
        moments.append(torch.zeros_like(x[t]) if still else _moment(gate, x[t], x[t - 1]))
        score = moments[t].norm()
        score = score * 0 if score <= rounding(torch.float64) else score
        score = torch.tanh(score * math.sqrt(d)) if gate.dim_free else torch.tanh(score)
        if gate.phase_mix > 0:
            radius, angle = _polar(gate, x[t])
            radii.append(radius)
            angles.append(angle)
            phases.append(score * 0 if still else _turn(angles[t], angles[t - 1]))
            score = (1 - gate.phase_mix) * score + gate.phase_mix * phases[t]
        if gate.codebook_mix > 0:
            change = _assignment(gate, x[t]) - _assignment(gate, x[t - 1] if t else x[t])
            books.append(score * 0 if still else 0.5 * change.abs().sum())
            score = (1 - gate.codebook_mix) * score + gate.codebook_mix * books[t]
        scores.append(score)
    quorum = _quorum(gate, scores)
    mix = gate.quorum_mix
    complexity = [s if mix == 0 else s * ((1 - mix) + mix * q) for s, q in zip(scores, quorum, strict=True)]
    return {
        "complexity": torch.stack(complexity)[:, None],
        "moment_map": torch.stack(moments),
        "phase_map": torch.stack(phases)[:, None] if phases else tokens.new_zeros(n, 1),
        "codebook_map": torch.stack(books)[:, None] if books else tokens.new_zeros(n, 1),
        "quorum_map": torch.stack(quorum)[:, None],
        "sparse_k": torch.tensor(kept)[:, None] if kept[0] is not None else None,
        "phase_radius": torch.stack(radii) if radii else None,
        "phase_angle": torch.stack(angles) if angles else None,
    }


def _gated(gate, token: Tensor) -> tuple[Tensor, int | None]:
    if not gate.gated:
        return token, None
    if gate.diag:
        pre, magnitude = token * gate.gate_weight + gate.gate_bias, token * gate.mag_weight + gate.mag_bias
    else:
        pre, magnitude = gate.to_gate(token), gate.to_mag(token)
    values, k = pre.tolist(), None
    if gate.top_k is not None:
        k = gate.top_k
    elif gate.adaptive_topk_ratio is not None:
        k = naive_adaptive_k(values, gate.adaptive_topk_ratio, gate.adaptive_topk_min_k)
    keep = [True] * len(values) if k is None else naive_top_k(values, k)
    out = []
    for i, kept in enumerate(keep):
        soft = torch.sigmoid(pre[i])
        hard = float(pre[i] > gate.gate_threshold)
        value = soft if gate.gate_mode == "soft" else hard + soft - soft.detach()
        out.append(value * torch.relu(magnitude[i]) if kept else pre[i] * 0)
    return torch.stack(out), k


def _moment(gate, now: Tensor, before: Tensor) -> Tensor:
    q, q_before = _unit(gate.to_twist_q(now)), _unit(gate.to_twist_q(before))
    k, k_before = _unit(gate.to_twist_k(now)), _unit(gate.to_twist_k(before))
    return q * k_before - q_before * k


def _unit(v: Tensor) -> Tensor:
    return v * 0 if not v.any() else v / v.norm().clamp(min=1e-12)


def _polar(gate, token: Tensor) -> tuple[Tensor, Tensor]:
    out = gate.to_phase(token)
    radius, angle = [], []
    for i in range(gate.phase_pairs):
        c, s = out[2 * i], out[2 * i + 1]
        at_zero = c == 0 and s == 0
        radius.append(c * 0 if at_zero else (c * c + s * s).sqrt())
        angle.append(c * 0 if at_zero else torch.atan2(s, c))
    return torch.stack(radius), torch.stack(angle)


def _turn(angle: Tensor, before: Tensor) -> Tensor:
    total = angle.new_zeros(())
    for now, then in zip(angle, before, strict=True):
        step = (now - then).abs()
        turn = (step if step <= math.pi else 2 * math.pi - step) / math.pi
        at_kink = min(turn, 1 - turn) <= rounding(torch.float64)
        total = total + (turn.detach() if at_kink else turn)
    return total / len(angle)


def _assignment(gate, token: Tensor) -> Tensor:
    probabilities = torch.softmax(gate.to_codebook(token) / gate.codebook_temperature, dim=-1)
    if gate.codebook_topk is None:
        return probabilities
    keep = naive_top_k(probabilities.tolist(), gate.codebook_topk)
    kept = torch.stack([p if kept else p * 0 for p, kept in zip(probabilities, keep, strict=True)])
    return kept / kept.sum()


def _quorum(gate, scores: list[Tensor]) -> list[Tensor]:
    n = len(scores)
    if gate.quorum_mix == 0:
        return [torch.ones_like(s) for s in scores]
    means = []
    for t in range(n):
        window = scores[max(0, t - gate.quorum_window + 1) : t + 1]
        means.append(torch.stack(window).mean(dim=0))
    quorum = [torch.sigmoid((m - gate.quorum_threshold) / gate.quorum_temperature) for m in means]
    if gate.budget_topk_ratio is None:
        return quorum
    levels = [m.item() for m in means]
    if gate.budget_window is None:
        keep = naive_top_k(levels, math.ceil(gate.budget_topk_ratio * n))
    else:
        keep = [_in_top(levels[max(0, t - gate.budget_window + 1) : t + 1], gate) for t in range(n)]
    return [q if kept else q * 0 for q, kept in zip(quorum, keep, strict=True)]


def _in_top(window: list[float], gate) -> bool:
    """Return whether the last of the window is among its top k; earlier ones win ties."""
    ahead = [level for level in window[:-1] if level >= window[-1] - rounding(torch.float64)]
    return len(ahead) < math.ceil(gate.budget_topk_ratio * gate.budget_window)
