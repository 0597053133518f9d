"""The errors of key-value pairs that are written one mini-batch after the other, in one triangular solve.

A pair's error is its value minus what the memory answers at the start of its mini-batch. That memory holds the errors
of the pairs before: the errors of a window solve a linear system, unit lower triangular, since no pair depends on a
later one. (For plain delta rules this is known as the WY or UT form, arXiv 2406.06484.) Derivation: docs/fast_path.md.

Letters: B rows, m chunks of p pairs, d and e the sides of the memory's matrix.
"""

import torch
from torch import Tensor


def naive_exact_errors(keys: Tensor, errors: Tensor, steps: Tensor, weights: Tensor) -> Tensor:
    """Return r_j = errors_j - sum over chunks l < j of weights_jl (k_j k_l^T) (steps_l r_l), chunk by chunk.

    keys [B m p d]; errors [B m p e], those at the memory before the window; steps [B m p], what a pair writes of its
    error; weights [B m m], strictly lower triangular: the share of chunk l's writes in the memory at which chunk j's
    errors are taken -> [B m p e].
    """
    out: list[Tensor] = []
    for j in range(keys.shape[1]):
        error = errors[:, j]
        for i, earlier in enumerate(out):
            scores = keys[:, j] @ keys[:, i].transpose(-1, -2)
            error = error - weights[:, j, i, None, None] * (scores @ (steps[:, i, :, None] * earlier))
        out.append(error)
    return torch.stack(out, dim=1)


def exact_errors(keys: Tensor, errors: Tensor, steps: Tensor, weights: Tensor) -> Tensor:
    """Return the same by one solve.

    By substitution, not by the powers of the matrix (its inverse by doubling): where keys repeat these are of the size
    of binomial coefficients, and cancel.
    """
    m, p = keys.shape[1:3]
    k = keys.flatten(1, 2)
    if p > 1:
        weights = weights.repeat_interleave(p, dim=1).repeat_interleave(p, dim=2)
    system = (k @ k.transpose(-1, -2)) * weights * steps.flatten(1).unsqueeze(1)
    solved = torch.linalg.solve_triangular(system, errors.flatten(1, 2), upper=False, unitriangular=True)
    return solved.unflatten(1, (m, p))
