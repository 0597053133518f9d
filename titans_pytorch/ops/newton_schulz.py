"""Orthogonalised updates: the quintic Newton-Schulz iteration of Muon (Jordan et al. 2024)."""

import torch
from torch import Tensor

from titans_pytorch.ops.modes import in_transform, naive_gradients, no_autocast, without_autocast

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
FLOOR = 1e-7
FRESH = 3
TILE_BYTES = 2**18  # per thread, of square matrices: what a step needs of them stays in a core's cache


def naive_newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """x [... d e] divided by its Frobenius norm, then `steps` times X <- (a I + b A + c A A) X, A = X X^T."""
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = x.transpose(-1, -2) if tall else x
    x = x * x.square().sum(dim=(-2, -1), keepdim=True).clamp(min=FLOOR**2).rsqrt()
    eye = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    for _ in range(steps):
        gram = x @ x.transpose(-1, -2)
        x = (a * eye + b * gram + c * gram @ gram) @ x
    return x.transpose(-1, -2) if tall else x


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """The same numbers. Most products are square in the smaller side: with P_k the polynomial in A_k, X_{k+1} = P_k X_k
    and A_{k+1} = P_k A_k P_k, so the P_k are multiplied up and applied every `FRESH` steps. (Not once in all:
    without the matrix itself, rounding in A's small eigenvalues grows by 3.4445^2 in every step.)

    Kept in float32 at least: in bfloat16 the iteration explodes.
    """
    dtype = x.dtype
    with no_autocast(x.device):
        x = x.float() if dtype in (torch.bfloat16, torch.float16) else x
        if in_transform():
            return naive_newton_schulz(x, steps).to(dtype)
        flat = x.reshape(-1, *x.shape[-2:])
        tall = x.shape[-2] > x.shape[-1]
        out = _NewtonSchulz.apply(flat.transpose(1, 2) if tall else flat, steps)
        return (out.transpose(1, 2) if tall else out).view_as(x).to(dtype)


class _NewtonSchulz(torch.autograd.Function):
    """x [N s l], s <= l, a few matrices at a time. Only x is kept: on the way back the iteration runs again."""

    @staticmethod
    def forward(ctx, x, steps):
        ctx.steps = steps
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        for part, into in zip(*(_tiles(t, x) for t in (x, out)), strict=True):
            _orthogonal(part, into, steps)
        return out

    @staticmethod
    @without_autocast
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: the plain form
            return *naive_gradients(lambda x: naive_newton_schulz(x, ctx.steps), (x,), grad), None
        slope = torch.empty_like(x)
        for part, up, into in zip(*(_tiles(t, x) for t in (x, grad, slope)), strict=True):
            _slope(part, up, into, ctx.steps)
        return slope, None


def _tiles(t: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """A kernel of an accelerator takes all matrices at once; a compiler, one graph for any number of them."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return (t,)
    return t.split(max(1, torch.get_num_threads() * TILE_BYTES // (x.shape[1] ** 2 * x.element_size())))


def _start(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X_0 = x / |x|, with |x|^2 and 1 / |x| [N 1 1]."""
    # the square root has no slope at zero: a zero matrix keeps the floor and a zero gradient
    square = x.square().sum(dim=(1, 2), keepdim=True)
    inverse = square.clamp(min=FLOOR**2).rsqrt()
    return x * inverse, square, inverse


def _polynomial(gram: Tensor) -> Tensor:
    """P = a + b A + c A A."""
    a, b, c = COEFFICIENTS
    poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    poly.diagonal(dim1=1, dim2=2).add_(a)
    return poly


def _sections(steps: int) -> list[int]:
    """Steps between fresh Gram matrices."""
    return [min(FRESH, steps - at) for at in range(0, steps, FRESH)]


def _orthogonal(x: Tensor, out: Tensor, steps: int) -> None:
    x, _, _ = _start(x)
    *first, last = _sections(steps)
    for size in first:
        x = _product(x, size) @ x
    torch.bmm(_product(x, last), x, out=out)


def _product(x: Tensor, steps: int) -> Tensor:
    """Q: the product of the P_k, X_steps = Q X."""
    gram = x @ x.transpose(1, 2)
    product = poly = _polynomial(gram)
    for _ in range(steps - 1):
        gram = poly @ gram @ poly
        poly = _polynomial(gram)
        product = poly @ product
    return product


def _slope(x: Tensor, grad: Tensor, out: Tensor, steps: int) -> None:
    """The gradient with respect to x."""
    unit, square, inverse = _start(x)
    sections = _sections(steps)
    starts = [unit]
    for size in sections[:-1]:
        starts.append(_product(starts[-1], size) @ starts[-1])
    for start, size in zip(reversed(starts), reversed(sections), strict=True):
        grad = _section_slope(start, grad, size)
    radial = torch.where(square > FLOOR**2, (grad * unit).sum(dim=(1, 2), keepdim=True), 0.0)
    torch.mul(grad.sub_(unit * radial), inverse, out=out)


def _section_slope(x: Tensor, grad: Tensor, steps: int) -> Tensor:
    """The gradient of Q X with respect to X.

    A, P and Q are symmetric polynomials of A_0. The derivative of such a polynomial in a symmetric direction is its own
    adjoint, so what Q's gradient does to A_0 is Q's derivative in its direction: d_gram, d_poly and d_product are the
    derivatives of A, P and Q, carried along by the product rule.
    """
    _, b, c = COEFFICIENTS
    gram = x @ x.transpose(1, 2)
    d_gram = _and_transposed(grad @ x.transpose(1, 2))  # twice the symmetric part: A_0 = X X^T

    def polynomial():
        return _polynomial(gram), _and_transposed(torch.baddbmm(d_gram, gram, d_gram, beta=b / 2, alpha=c))

    poly, d_poly = polynomial()
    product, d_product = poly, d_poly
    for _ in range(steps - 1):
        half = poly @ gram  # A_{k+1} = P A P
        d_gram = _and_transposed(torch.bmm(d_poly, half).baddbmm_(poly, d_gram @ poly, alpha=0.5))
        gram = half @ poly
        poly, d_poly = polynomial()
        d_product = torch.bmm(poly, d_product).baddbmm_(d_poly, product)
        product = poly @ product
    return torch.bmm(product, grad).baddbmm_(d_product, x)


def _and_transposed(x: Tensor) -> Tensor:
    return x + x.transpose(1, 2)
