"""Key and value vectors as tokens: one token holds both, a query holds only the key.

Letters: b batch, n tokens, u pairs, c context tokens, k features of a key, v features of a value, d = k + v.
"""

from __future__ import annotations

from harness.later import torch

import titans_pytorch


def unit_rows(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """Draw random directions of length sqrt(features), as RMSNorm would leave them."""
    x = torch.randn(*shape, generator=generator)
    return x * (shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True))


def tokens_of(
    context: torch.Tensor, keys: torch.Tensor, values: torch.Tensor | None, strength: float = 0.0
) -> torch.Tensor:
    """Join context [c d], keys [b u k] and values [b u v] (None, for queries: zeros) to tokens [b c+u d].

    strength: how much of the context (its first token) is added to each pair or query.
    """
    b, u, k = keys.shape
    values = keys.new_zeros(b, u, context.shape[-1] - k) if values is None else values
    pairs = torch.cat((keys, values), dim=-1) + strength * context[0]
    return torch.cat((context.expand(b, -1, -1), pairs), dim=1)


def write(
    memory: torch.nn.Module, tokens: torch.Tensor, silent: int, state: titans_pytorch.NeuralMemState | None
) -> titans_pytorch.NeuralMemState:
    """Return the state after writing tokens [b n d] but the first `silent`."""
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    mask[:, :silent] = False
    return memory(tokens, state=state, store_mask=mask)[1]


def ask(
    memory: torch.nn.Module, tokens: torch.Tensor, silent: int, state: titans_pytorch.NeuralMemState
) -> torch.Tensor:
    """Return the outputs [b u d] for the queries after the first `silent` tokens [b n d]. Nothing is written; the state
    stays the same."""
    mask = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return memory(tokens, state=state, store_mask=mask)[0][:, silent:]


def relative_error(answers: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error over the mean square of the values: 1 for predicting zero."""
    return (answers - values).square().mean() / values.square().mean()


def chosen_right(answers: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the share of the outputs that lie nearest to their own value among the values of their row: [b u v]
    -> [].
    """
    nearest = torch.cdist(answers, values).argmin(dim=-1)
    return (nearest == torch.arange(values.shape[1], device=values.device)).float().mean()
