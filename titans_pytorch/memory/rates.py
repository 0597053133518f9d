"""The learned rates of a write: learning rate theta, momentum eta, forget gate alpha (Titans, eq. 13 and 14).

Letters: b batch, n tokens, m chunks, c tokens per chunk, h heads, u keys and values per token, o momentum order,
w parameters of the memory model.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from titans_pytorch.common.checks import Words, wrong
from titans_pytorch.ops.modes import at_least_float32
from titans_pytorch.rules.rates import WriteRates


class AveragePool(nn.Module):
    """The mean of a chunk's tokens: [b m c d] -> [b m d]."""

    def forward(self, chunks: Tensor) -> Tensor:
        return chunks.mean(dim=2)


class AttentionPool(nn.Module):
    """A learned softmax over a chunk's tokens, per feature: [b m c d] -> [b m d]. It starts as the mean."""

    def __init__(self, dim: int):
        super().__init__()
        # no bias: the softmax over tokens cancels it
        self.to_attn_logits = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.to_attn_logits.weight)

    def forward(self, chunks: Tensor) -> Tensor:
        return (chunks * self.to_attn_logits(chunks).softmax(dim=2)).sum(dim=2)


@dataclass(frozen=True)
class RateConfig:
    """The keywords of NeuralMemory that concern rates. heads: heads of all pages."""

    heads: int
    kv_per_token: int
    momentum_order: int  # 0: no momentum
    learned_combine: bool
    combine_zeroth: bool
    modulated_params: int  # 0: no modulation
    max_modulation: float
    attn_pool: bool
    residual_mix: bool
    step_transform: Callable[[Tensor], Tensor]
    step_bias: float | None
    momentum_bias: float | None
    decay_bias: float | None
    fixed_step: float | None = None  # the learning rate if it is not learned
    forget_gate: bool = True
    earlier_pairs: int = 0  # pairs of a surprise window before the chunk
    loss_bound: bool = False


class Rates(nn.Module):
    """Computes all rates of a write from the normalised key view."""

    def __init__(self, dim: int, config: RateConfig):
        super().__init__()
        o = self.config = config
        self.step_transform = o.step_transform  # registered as a submodule if it is an nn.Module
        self.reduce_to_chunk_rep = AttentionPool(dim) if o.attn_pool else AveragePool()
        self.to_adaptive_step = _linear(dim, o.heads * o.kv_per_token, o.step_bias) if o.fixed_step is None else None
        self.to_decay_factor = _linear(dim, o.heads, o.decay_bias) if o.forget_gate else None
        order = o.momentum_order
        self.to_momentum = _linear(dim, o.heads * order, o.momentum_bias) if order else None
        combined = (order + o.combine_zeroth) * o.learned_combine if order else 0
        # a mixture of one is that one
        self.to_learned_momentum_combine = nn.Linear(dim, o.heads * combined) if combined > 1 else None
        self.to_layer_modulation = nn.Linear(dim, o.heads * o.modulated_params) if o.modulated_params else None
        self.to_learned_weight_residual_mix = nn.Linear(dim, o.heads) if o.residual_mix else None
        self.to_loss_bound = nn.Linear(dim, o.heads * o.kv_per_token) if o.loss_bound else None
        self.to_window_weights = nn.Linear(dim, o.heads * o.earlier_pairs) if o.earlier_pairs else None

    def forward(self, tokens: Tensor, chunk: int, with_residual: bool) -> WriteRates:
        """Return the rates of m complete chunks of `chunk` tokens. tokens: [b m*c d]."""
        h = self.config.heads
        step = self._step(tokens)
        chunks = self.reduce_to_chunk_rep(tokens.unflatten(1, (-1, chunk)))

        def per_head(linear, x=chunks):
            if linear is None:
                return None
            return at_least_float32(linear(x)).unflatten(-1, (h, -1)).transpose(1, 2).flatten(0, 1)  # [(b h) m k]

        momentum, combine = per_head(self.to_momentum), per_head(self.to_learned_momentum_combine)
        modulation = per_head(self.to_layer_modulation)
        mix = per_head(self.to_learned_weight_residual_mix) if with_residual else None
        decay, window = per_head(self.to_decay_factor), per_head(self.to_window_weights)
        learning_rate = self._of_pairs(step, chunk)
        # sigmoid(-x), not 1 - sigmoid(x): exact where the forget gate is small
        retention = learning_rate.new_ones(learning_rate.shape[:2]) if decay is None else (-decay).sigmoid().squeeze(-1)
        bound = None
        if self.to_loss_bound is not None:
            bound = self._of_pairs(nn.functional.softplus(at_least_float32(self.to_loss_bound(tokens))), chunk)
        return WriteRates(
            learning_rate=learning_rate,
            retention=retention,
            bound=bound,
            window=None if window is None else window.sigmoid(),
            momentum=None if momentum is None else momentum.sigmoid(),
            combine=None if combine is None else combine.softmax(dim=-1),
            modulation=None if modulation is None else modulation.sigmoid() * self.config.max_modulation,
            residual_mix=None if mix is None else mix.sigmoid().squeeze(-1),
        )

    def _of_pairs(self, x: Tensor, chunk: int) -> Tensor:
        """Rearrange values of tokens [b m*c h*u] to values of pairs [(b h) m c*u]."""
        x = x.unflatten(1, (-1, chunk)).unflatten(-1, (self.config.heads, -1))
        return x.permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1)

    def _step(self, tokens: Tensor) -> Tensor:
        if self.to_adaptive_step is None:
            assert self.config.fixed_step is not None
            width = self.config.heads * self.config.kv_per_token
            return at_least_float32(tokens.new_full((*tokens.shape[:2], width), self.config.fixed_step))
        logits = at_least_float32(self.to_adaptive_step(tokens))
        step = self.step_transform(logits)
        if not isinstance(step, Tensor) or step.shape != logits.shape:
            got = f"shape {tuple(step.shape)}" if isinstance(step, Tensor) else type(step).__name__
            raise wrong("adaptive_step_transform", Words(got), f"one step per logit: shape {tuple(logits.shape)}")
        return step


class SigmoidStep:
    """The default map from logits to learning rates: sigmoid(x) times the maximum."""

    def __init__(self, max_step: float):
        self.max_step = max_step

    def __call__(self, x: Tensor) -> Tensor:
        return x.sigmoid() * self.max_step


def _linear(dim: int, width: int, start_bias: float | None) -> nn.Linear:
    """Make a linear map. With `start_bias`, its weight starts at zero and its bias at that value."""
    linear = nn.Linear(dim, width)
    if start_bias is not None:
        nn.init.zeros_(linear.weight)
        nn.init.constant_(linear.bias, start_bias)
    return linear
