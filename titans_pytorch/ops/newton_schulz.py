"""Orthogonalised updates: the quintic Newton-Schulz iteration of Muon (Jordan et al. 2024)."""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
FLOOR = 1e-7


def naive_newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """x [... d e] divided by its Frobenius norm, then `steps` times X <- (a I + b A + c A A) X, A = X X^T."""
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = x.transpose(-1, -2) if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=FLOOR)
    eye = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    for _ in range(steps):
        gram = x @ x.transpose(-1, -2)
        x = (a * eye + b * gram + c * gram @ gram) @ x
    return x.transpose(-1, -2) if tall else x


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """The same numbers. All products but the first and the last are square in the smaller side: with P_k the
    polynomial in A_k, X_{k+1} = P_k X_k and A_{k+1} = P_k A_k P_k, so the P_k are multiplied up and applied once.

    Kept in float32 at least: in bfloat16 the iteration explodes.
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = x.dtype
        x = x.float() if dtype in (torch.bfloat16, torch.float16) else x
        tall = x.shape[-2] > x.shape[-1]
        # the square root has no slope at zero: a zero matrix keeps the floor and a zero gradient
        square = x.square().sum(dim=(-2, -1), keepdim=True)
        x = x * square.clamp(min=FLOOR**2).rsqrt()
        gram = x.transpose(-1, -2) @ x if tall else x @ x.transpose(-1, -2)
        product = None
        for step in range(steps):
            poly = _polynomial(gram)
            product = poly if product is None else poly @ product
            if step + 1 < steps:
                gram = poly @ gram @ poly
        return (x @ product if tall else product @ x).to(dtype)


def _polynomial(gram: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    flat = gram.reshape(-1, *gram.shape[-2:])
    poly = torch.baddbmm(flat, flat, flat, beta=b, alpha=c).view_as(gram)
    return poly + a * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
