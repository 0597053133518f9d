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
    dtype = x.dtype
    with torch.autocast(x.device.type, enabled=False):
        x = x.float() if dtype in (torch.bfloat16, torch.float16) else x
        flat = x.reshape(-1, *x.shape[-2:])
        tall = x.shape[-2] > x.shape[-1]
        out = _NewtonSchulz.apply(flat.transpose(1, 2) if tall else flat, steps)
        return (out.transpose(1, 2) if tall else out).view_as(x).to(dtype)


class _NewtonSchulz(torch.autograd.Function):
    """x [N s l], s <= l. A, P and their products Q are symmetric, and so is all that their slopes do: products with a
    transpose are a transposed copy."""

    @staticmethod
    def forward(ctx, x, steps):
        a, b, c = COEFFICIENTS
        # the square root has no slope at zero: a zero matrix keeps the floor and a zero gradient
        square = x.square().sum(dim=(1, 2), keepdim=True)
        inverse = square.clamp(min=FLOOR**2).rsqrt()
        unit = x * inverse
        gram = unit @ unit.transpose(1, 2)
        chain = []
        for step in range(steps):
            poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            poly.diagonal(dim1=1, dim2=2).add_(a)
            product = poly if step == 0 else poly @ chain[-1][2]
            half = None if step + 1 == steps else poly @ gram
            chain.append((gram, poly, product, half))
            gram = None if half is None else half @ poly
        ctx.steps = steps
        ctx.save_for_backward(x, unit, inverse, square, *(t for link in chain for t in link if t is not None))
        return chain[-1][2] @ unit

    @staticmethod
    def backward(ctx, grad):
        _, b, c = COEFFICIENTS
        x, unit, inverse, square, *saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: the plain form
            x = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(naive_newton_schulz(x, ctx.steps), x, grad, create_graph=True)[0], None
        chain = [saved[i : i + 4] for i in range(0, len(saved), 4)]  # the last link has no half step
        d_unit = chain[-1][2] @ grad
        d_product = _symmetric(grad @ unit.transpose(1, 2), 0.5)
        d_gram = None
        for step in reversed(range(ctx.steps)):
            gram, poly, _, *half = chain[step]
            if step:
                d_poly = _symmetric(d_product @ chain[step - 1][2], 0.5)
                d_product = _symmetric(poly @ d_product, 0.5) if step > 1 else poly @ d_product
            else:
                d_poly = _symmetric(d_product, 0.5)
            if d_gram is not None:  # A_{k+1} = P A P
                d_poly += _symmetric(d_gram @ half[0])
                d_gram = poly @ d_gram @ poly
            through = _symmetric(torch.bmm(d_poly, gram), c).add_(d_poly, alpha=b)  # P = a + b A + c A A
            d_gram = through if d_gram is None else d_gram.add_(through)
        d_unit.baddbmm_(_symmetric(d_gram, 1.0), unit)
        radial = (d_unit * unit).sum(dim=(1, 2), keepdim=True)
        radial = torch.where(square > FLOOR**2, radial, 0.0)
        return d_unit.sub_(unit * radial).mul_(inverse), None


def _symmetric(x: Tensor, scale: float = 1.0) -> Tensor:
    """scale (x + x^T)."""
    x = x + x.transpose(1, 2)
    return x if scale == 1.0 else x.mul_(scale)
