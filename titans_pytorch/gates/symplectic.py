"""SymplecticGating: the complexity of each token, a number in [0, 1].

Letters: b batch, n tokens, d features (dim), p phase pairs. The equations are in `scores` and `quorum`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from titans_pytorch.common.checks import check_flags
from titans_pytorch.common.names import known_keywords
from titans_pytorch.gates import checks
from titans_pytorch.gates.quorum import budget_size, sequence_budget, trailing_budget, trailing_mean
from titans_pytorch.gates.scores import (
    codebook_step,
    moved,
    per_token,
    phase_step,
    polar,
    rounding,
    safe_norm,
    twist_moment,
    unit_norm,
)
from titans_pytorch.gates.selection import adaptive_k, top_k_mask


@known_keywords
class SymplecticGating(nn.Module):
    """Complexity of each token given the tokens before it: tokens [b n d] -> [b n 1] in [0, 1].

    The base score is the twist: with unit-norm linear maps q, k of the tokens, tanh of the norm of q_t * k_{t-1} -
    q_{t-1} * k_t. It is 0 at the first token and wherever a token repeats the one before. Every option is causal except
    a budget without `budget_window`. Not from a paper: from displague's fork of titans-pytorch.

    Args: Features
        dim: features per token.
        gated: score gate(x) * relu(magnitude(x)) in place of x; both are linear maps.
        diag: these maps are elementwise (with `gated`).
        gate_mode: "hard": gate_pre > threshold with the gradient of sigmoid(gate_pre) (straight through); "soft":
            sigmoid(gate_pre).
        gate_threshold: threshold of the hard gate.
        top_k: keep exactly the k features of each token with the largest gate_pre (of equal ones those with lower
            index), zero elsewhere (with `gated`).
        adaptive_topk_ratio: in its place: k = ceil(tanh(mean |gate_pre|) * ratio * dim).
        adaptive_topk_min_k: least k.

    Args: Scores
        dim_free: scale the norm of the twist by sqrt(dim), since on noise it shrinks like 1 / sqrt(dim).
        phase_mix: share of the phase score: the mean angle, over pi, between a token and the one before in pairs of a
            linear map.
        phase_pairs: number of pairs; default dim // 2.
        codebook_mix: share of the codebook score, blended after phase: total variation between consecutive tokens' soft
            assignments.
        codebook_size: number of entries.
        codebook_temperature: temperature of the assignments.
        codebook_topk: assign to the top k entries alone.

    Args: Quorum
        quorum_mix: complexity *= (1 - mix) + mix * quorum.
        quorum_window: number of scores in the mean; quorum = sigmoid((mean - threshold) / temperature).
        quorum_threshold: threshold of the quorum.
        quorum_temperature: temperature of the quorum.
        budget_topk_ratio: keep the quorum at the top ceil(ratio * n) positions of the sequence, zero elsewhere. Not
            causal.
        budget_window: a window w; keep the quorum at positions among the top ceil(ratio * w) of the last w. Causal.

    Raises:
        ValueError: for values out of range, both top-k options, or a budget without a quorum.
    """

    def __init__(
        self,
        dim: int,
        gated: bool = False,
        diag: bool = False,
        gate_threshold: float = 0.0,
        gate_mode: str = "hard",
        top_k: int | None = None,
        adaptive_topk_ratio: float | None = None,
        adaptive_topk_min_k: int = 1,
        phase_mix: float = 0.0,
        phase_pairs: int | None = None,
        quorum_mix: float = 0.0,
        quorum_window: int = 3,
        quorum_threshold: float = 0.5,
        quorum_temperature: float = 0.1,
        budget_topk_ratio: float | None = None,
        codebook_mix: float = 0.0,
        codebook_size: int = 16,
        codebook_temperature: float = 0.1,
        codebook_topk: int | None = None,
        budget_window: int | None = None,
        dim_free: bool = False,
    ):
        check_flags(SymplecticGating.__init__, locals())
        super().__init__()
        self.dim = checks.int_between("dim", dim)
        self.gated, self.diag, self.dim_free = bool(gated), bool(diag), bool(dim_free)
        self.gate_threshold = checks.number("gate_threshold", gate_threshold)
        self.gate_mode = checks.one_of("gate_mode", gate_mode, ("hard", "soft"))
        self.top_k = _optional(checks.int_between, "top_k", top_k, 1, dim)
        self.adaptive_topk_ratio = _optional(checks.fraction, "adaptive_topk_ratio", adaptive_topk_ratio, False)
        self.adaptive_topk_min_k = checks.int_between("adaptive_topk_min_k", adaptive_topk_min_k, 1, dim)
        self.phase_mix = checks.fraction("phase_mix", phase_mix)
        self.phase_pairs = dim // 2 if phase_pairs is None else checks.int_between("phase_pairs", phase_pairs)
        self.quorum_mix = checks.fraction("quorum_mix", quorum_mix)
        self.quorum_window = checks.int_between("quorum_window", quorum_window)
        self.quorum_threshold = checks.fraction("quorum_threshold", quorum_threshold)
        self.quorum_temperature = checks.positive("quorum_temperature", quorum_temperature)
        self.budget_topk_ratio = _optional(checks.fraction, "budget_topk_ratio", budget_topk_ratio, False)
        self.budget_window = _optional(checks.int_between, "budget_window", budget_window)
        self.codebook_mix = checks.fraction("codebook_mix", codebook_mix)
        self.codebook_size = checks.int_between("codebook_size", codebook_size)
        self.codebook_temperature = checks.positive("codebook_temperature", codebook_temperature)
        self.codebook_topk = _optional(checks.int_between, "codebook_topk", codebook_topk, 1, self.codebook_size)
        if top_k is not None and adaptive_topk_ratio is not None:
            raise ValueError("top_k cannot be combined with adaptive_topk_ratio")
        if budget_topk_ratio is not None and self.quorum_mix == 0:
            raise ValueError("budget_topk_ratio needs a quorum_mix above 0")
        if budget_window is not None and budget_topk_ratio is None:
            raise ValueError("budget_window needs budget_topk_ratio")
        if self.phase_mix > 0 and self.phase_pairs == 0:
            raise ValueError("phase_mix needs phase_pairs at dim 1")

        if self.gated and self.diag:
            self.gate_weight, self.gate_bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
            self.mag_weight, self.mag_bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        elif self.gated:
            self.to_gate, self.to_mag = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.to_twist_q = nn.Linear(dim, dim, bias=False)
        self.to_twist_k = nn.Linear(dim, dim, bias=False)
        if self.phase_mix > 0:
            self.to_phase = _small_linear(dim, 2 * self.phase_pairs)
        if self.codebook_mix > 0:
            self.to_codebook = _small_linear(dim, self.codebook_size)

    @property
    def causal(self) -> bool:
        """Whether a score depends only on its token and the `context` tokens before it."""
        return self.context is not None

    @property
    def context(self) -> int | None:
        """Number of earlier tokens that a score depends on. None with a budget over the whole sequence, where no number
        is enough.
        """
        if self.budget_topk_ratio is not None and self.budget_window is None:
            return None
        quorum = self.quorum_window - 1 if self.quorum_mix > 0 else 0
        return 1 + quorum + (self.budget_window - 1 if self.budget_window is not None else 0)

    def forward(
        self,
        x: Tensor,
        return_moment_map: bool = False,
        return_phase_map: bool = False,
        return_codebook_map: bool = False,
        return_sparse_k: bool = False,
        return_manifold_state: bool = False,
        return_quorum_map: bool = False,
    ):
        """Return the complexity of tokens, and its parts if requested.

        Args:
            x: tokens [b n d].
            return_moment_map: also the twist's moment [b n d].
            return_phase_map: also the phase score [b n 1]; 0 without `phase_mix`.
            return_codebook_map: also the codebook score [b n 1]; 0 without `codebook_mix`.
            return_sparse_k: also the number of features kept, long [b n 1]; None without `gated` and a top-k option.
            return_manifold_state: also the result of `extract_manifold_state`.
            return_quorum_map: also the quorum after the budget [b n 1]; 1 without a quorum.

        Returns:
            Complexity [b n 1], or a tuple of it and the parts requested, in the order: moment, phase, codebook, quorum,
            sparse k, manifold state.

        Raises:
            ValueError: for another shape, or tokens that are not floating point.
        """
        self._check_tokens(x)
        n, dtype = x.shape[1], x.dtype
        turns = moved(x)
        x, sparse_k = self._gate(x)
        q, k = (unit_norm(_at_least_float(to(x))) for to in (self.to_twist_q, self.to_twist_k))
        moment = torch.where(turns, twist_moment(q, k), 0.0)
        step = (safe_norm(moment, rounding(moment.dtype)) * (self.dim**0.5 if self.dim_free else 1.0)).tanh()

        phase, manifold = torch.zeros_like(step), None
        if self.phase_mix > 0:
            radius, angle = polar(_at_least_float(self.to_phase(x)))
            phase = torch.where(turns, phase_step(angle), 0.0)
            step = (1 - self.phase_mix) * step + self.phase_mix * phase
            manifold = {"phase_radius": radius.to(dtype), "phase_angle": angle.to(dtype)}
        codebook = torch.zeros_like(step)
        if self.codebook_mix > 0:
            codebook = torch.where(turns, codebook_step(self._assign(x)), 0.0)
            step = (1 - self.codebook_mix) * step + self.codebook_mix * codebook
        complexity, quorum = self.apply_quorum_policy(per_token(step, n))

        complexity = complexity.to(dtype)
        asked: list[Any] = []
        for wanted, steps in (
            (return_moment_map, moment),
            (return_phase_map, phase),
            (return_codebook_map, codebook),
        ):
            if wanted:
                asked.append(per_token(steps, n).to(dtype))
        if return_quorum_map:
            asked.append(quorum.to(dtype))
        if return_sparse_k:
            asked.append(sparse_k)
        if return_manifold_state:
            asked.append(manifold)
        return (complexity, *asked) if asked else complexity

    def extract_manifold_state(self, x: Tensor) -> dict[str, Tensor] | None:
        """Return dict(phase_radius, phase_angle) of tokens x [b n d], each [b n p]; None if `phase_mix` is 0."""
        self._check_tokens(x)
        if self.phase_mix == 0:
            return None
        radius, angle = polar(_at_least_float(self.to_phase(self._gate(x)[0])))
        return {"phase_radius": radius.to(x.dtype), "phase_angle": angle.to(x.dtype)}

    def compute_sparse_mask(self, gate_pre: Tensor, return_k: bool = False):
        """Return the mask of the features that the top-k options keep: exactly k in each token, of equal values those
        with lower index; without a top-k option, all.

        Args:
            gate_pre: gate pre-activations [b n d].
            return_k: also return k, long [b n 1].

        Returns:
            bool [b n d], or (mask, k).
        """
        d = gate_pre.shape[-1]
        if self.adaptive_topk_ratio is not None:
            k = adaptive_k(_at_least_float(gate_pre), self.adaptive_topk_ratio, min(self.adaptive_topk_min_k, d))
            mask = top_k_mask(gate_pre, k)
        else:
            size = d if self.top_k is None else min(self.top_k, d)
            k = torch.full((*gate_pre.shape[:-1], 1), size, dtype=torch.long, device=gate_pre.device)
            mask = torch.ones_like(gate_pre, dtype=torch.bool) if size == d else top_k_mask(gate_pre, size)
        return (mask, k) if return_k else mask

    def apply_quorum_policy(self, score: Tensor, return_budget_k: bool = False):
        """Return scores after the quorum and its budget.

        Args:
            score: [b n 1].
            return_budget_k: also return k, the number of positions that a budget keeps: the int ceil(ratio * length),
                with the length of the sequence or of the budget's window; n without a budget.

        Returns:
            (adjusted, quorum), each [b n 1], or (adjusted, quorum, k). Without a quorum: the scores as they are, and
            ones.
        """
        n, level = score.shape[1], score.squeeze(-1)
        quorum, budget_k = torch.ones_like(score), n
        if self.quorum_mix > 0:
            level = trailing_mean(level, self.quorum_window)
            quorum = ((level - self.quorum_threshold) / self.quorum_temperature).sigmoid().unsqueeze(-1)
            if self.budget_topk_ratio is not None:
                budget_k = budget_size(self.budget_topk_ratio, self.budget_window or n)
                quorum = quorum.masked_fill(~self._within_budget(level).unsqueeze(-1), 0.0)
            score = score * ((1 - self.quorum_mix) + self.quorum_mix * quorum)
        return (score, quorum, budget_k) if return_budget_k else (score, quorum)

    def _within_budget(self, level: Tensor) -> Tensor:
        # ranked by the mean, not by the quorum: the order is the same until the sigmoid saturates
        if self.budget_window is None:
            return sequence_budget(level, self.budget_topk_ratio)
        return trailing_budget(level, self.budget_topk_ratio, self.budget_window)

    def _gate(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return gate * relu(magnitude) on the kept features, and the number kept (None without a limit)."""
        if not self.gated:
            return x, None
        if self.diag:
            pre, magnitude = x * self.gate_weight + self.gate_bias, x * self.mag_weight + self.mag_bias
        else:
            pre, magnitude = self.to_gate(x), self.to_mag(x)
        gate = pre.sigmoid()
        if self.gate_mode == "hard":
            # the bracket is exactly zero and carries the sigmoid's gradient
            gate = (pre > self.gate_threshold).to(gate.dtype) + (gate - gate.detach())
        gated = gate * magnitude.relu()
        if self.top_k is None and self.adaptive_topk_ratio is None:
            return gated, None
        mask, k = self.compute_sparse_mask(pre, return_k=True)
        # a product, not torch.where: NaN must propagate
        return gated * mask, k

    def _assign(self, x: Tensor) -> Tensor:
        """Return the soft assignment of each token to the codebook [b n s]."""
        logits = _at_least_float(self.to_codebook(x)) / self.codebook_temperature
        if self.codebook_topk is not None and self.codebook_topk < self.codebook_size:
            logits = logits.masked_fill(~top_k_mask(logits.detach(), self.codebook_topk), float("-inf"))
        return logits.softmax(dim=-1)

    def _check_tokens(self, x: Tensor):
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[-1] != self.dim:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be tokens [b n {self.dim}], got {got}")
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point tokens, got {x.dtype}")
        if x.shape[0] == 0:
            raise ValueError(f"x must be tokens [b n {self.dim}] of at least one row, got shape {tuple(x.shape)}")


def _optional(check, name, value, *limits):
    return None if value is None else check(name, value, *limits)


def _small_linear(dim: int, out: int) -> nn.Linear:
    linear = nn.Linear(dim, out, bias=False)
    nn.init.normal_(linear.weight, std=0.02)
    return linear


def _at_least_float(x: Tensor) -> Tensor:
    """Convert half precision to float32, for norms and angles."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
