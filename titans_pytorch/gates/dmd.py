"""Dynamic mode decomposition: how far a sequence is from a linear system, for whole sequences and trailing windows.

Letters: b batch, n snapshots (tokens), d features, w window, p the smaller of d and the number of pairs, r rank.

With X the snapshots 1..n-1 as columns, Y the snapshots 2..n and X = U S V^T cut at rank r, projected DMD (Schmid 2010,
doi 10.1017/S0022112010001217) predicts Y by U U^T Y V V^T. Both projections are orthogonal, so that

    |Y - U U^T Y V V^T|^2 = |Y|^2 - |U^T Y V|^2,    |U^T Y V|^2 = sum over i, j <= r of (v_i^T C v_j)^2 / l_i

where G = X^T X = V diag(l) V^T and C = X^T Y; the same holds with U for V, G = X X^T and C = X Y^T. The smaller of the
two Gram matrices is taken, in float64: squaring then costs float32 input no accuracy.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.common.names import known_keywords
from titans_pytorch.gates import checks
from titans_pytorch.ops.modes import in_transform, without_autocast


@known_keywords
class DynamicModeDecomposition(nn.Module):
    """One-step error of projected DMD: snapshots [.. n d] -> mean squared error [..] over n - 1 steps and d features.

    With X the snapshots 1..n-1 as columns, Y the snapshots 2..n and X = U S V^T cut at rank r: the mean square of Y - U
    U^T Y V V^T (Schmid 2010, doi 10.1017/S0022112010001217). Zero for linear systems (with enough snapshots to see
    their modes) and for fewer than two snapshots. Singular values below max(n, d) eps times the largest (in float64
    about 1e-7 times) are left out as rounding. Differentiable: slopes are finite where singular values are zero or
    equal. A sequence that is not finite has error NaN.

    Args:
        rank: number of singular directions of X to keep; None: all.

    Raises:
        ValueError: for a rank that is not a positive int.
    """

    def __init__(self, rank: int | None = None):
        super().__init__()
        self.rank = None if rank is None else checks.int_between("rank", rank)

    def forward(self, x: Tensor, return_eigenvalues: bool = False):
        """Return the error of sequences.

        Args:
            x: snapshots [.. n d], floating point.
            return_eigenvalues: also the eigenvalues of U^T Y V S^-1, complex [.. r], r = min(rank, n - 1, d); below the
                numerical rank they are zero. They carry no gradient.

        Returns:
            error [..], or (error, eigenvalues).

        Raises:
            ValueError: for another shape or dtype.
        """
        if not isinstance(x, Tensor) or x.ndim < 2:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be snapshots [.. n d], got {got}")
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point snapshots, got {x.dtype}")
        n, d = x.shape[-2:]
        flat = x.reshape(math.prod(x.shape[:-2]), n, d)
        error = windowed_dmd_error(flat, max(n, 1), max(n, 1), self.rank)
        error = (error.squeeze(1) if n else flat.sum(dim=(-1, -2))).view(x.shape[:-2])
        return (error, _eigenvalues(x.detach(), self.rank)) if return_eigenvalues else error


def windowed_dmd_error(x: Tensor, window: int, every: int, rank: int | None = None, context: int = 0) -> Tensor:
    """Return the DMD error of the last `window` tokens, every `every` tokens. x [b n d] -> [b (n - context) // every].

    Entry i is the error of tokens e - window .. e - 1 (fewer at the start), with e = context + (i + 1) * every. Windows
    may begin in the first `context` tokens. With window - every of them, or all earlier tokens, entries equal those of
    the whole sequence. Fewer than two tokens have error 0.

    `rank` as in DynamicModeDecomposition. Raises ValueError for a window or step below 1 or a negative context.
    """
    checks.int_between("window", window)
    checks.int_between("every", every)
    checks.int_between("context", context, 0)
    if x.ndim != 3:
        raise ValueError(f"x must be tokens [b n d], got shape {tuple(x.shape)}")
    n, d = x.shape[1:]
    chunks = max(0, (n - context) // every)
    if chunks == 0 or window < 2:
        return x[:, :0].sum(dim=(1, 2))[:, None].expand(-1, chunks)
    # Windows that begin before the start see zeros there. Pairs that begin with such a zero are left out of |Y|^2. They
    # do not change the matrices, because kept eigenvectors are zero at them.
    missing = window - every - context
    reach = F.pad(x, (0, 0, missing, context + chunks * every - n)).to(torch.float64)
    first = (missing - every * torch.arange(chunks, device=x.device)).clamp(0, window)
    there = torch.arange(window - 1, device=x.device) >= first[:, None]
    pairs = there.sum(dim=-1)
    moments = _gram_of_snapshots if window - 1 <= d else _gram_of_features
    gram, cross, square = moments(reach, window, every, chunks, there)

    finite = (gram.isfinite() & cross.isfinite()).all(dim=-1).all(dim=-1)
    gram, cross = (torch.where(finite[..., None, None], matrix, 0.0) for matrix in (gram, cross))
    cut = relative_cut(x.dtype, pairs.clamp(min=d), min(window - 1, d))
    error = (square - captured_energy(gram, cross, cut, rank)).clamp(min=0.0) / (d * pairs.clamp(min=1))
    return torch.where(finite, error, math.nan).to(x.dtype)


def naive_dmd_error(x: Tensor, rank: int | None = None) -> Tensor:
    """Return the error of one sequence [n d] by its definition. Its gradient needs distinct singular values."""
    n, d = x.shape
    if n < 2:
        return x.sum() * 0
    early, late = x[:-1].mT, x[1:].mT
    u, s, vh = torch.linalg.svd(early, full_matrices=False)
    r = int((s > s.max() * max(n, d) * torch.finfo(x.dtype).eps).sum())
    r = r if rank is None else min(r, rank)
    u, v = u[:, :r], vh[:r].mT
    return (late - u @ (u.mT @ late @ v) @ v.mT).square().mean()


def naive_windowed_dmd_error(x: Tensor, window: int, every: int, rank: int | None = None, context: int = 0) -> Tensor:
    """`windowed_dmd_error` as a loop over rows and windows."""
    ends = range(context + every, x.shape[1] + 1, every)
    rows = [[naive_dmd_error(row[max(0, end - window) : end], rank) for end in ends] for row in x]
    return torch.stack([torch.stack(row) if row else x.new_zeros(0) for row in rows])


def _gram_of_snapshots(reach: Tensor, window: int, every: int, chunks: int, there: Tensor):
    """Return X^T X, X^T Y, each [b c w-1 w-1], and |Y|^2 [b c], from inner products of snapshots.

    Overlapping windows share products: they are taken within blocks of the windows that fit in two window lengths.
    """
    at_once = min(max(1, window // every), chunks)
    blocks, span = -(-chunks // at_once), window + (at_once - 1) * every
    reach = F.pad(reach, (0, 0, 0, (blocks - 1) * at_once * every + span - reach.shape[1]))
    tokens = reach.unfold(1, span, at_once * every).mT.contiguous()
    products = tokens @ tokens.mT if in_transform() else _InnerProducts.apply(tokens)
    if at_once > 1:
        rows = every * torch.arange(at_once, device=reach.device)[:, None] + torch.arange(window, device=reach.device)
        where = rows[:, :, None] * span + rows[:, None, :]
        products = products.flatten(-2).index_select(-1, where.flatten())
    products = products.reshape(len(reach), blocks * at_once, window, window)[:, :chunks]
    square = products.diagonal(dim1=-2, dim2=-1)[..., 1:] * there
    return products[..., :-1, :-1], products[..., :-1, 1:], square.sum(dim=-1)


def _gram_of_features(reach: Tensor, window: int, every: int, chunks: int, there: Tensor):
    """Return X X^T, X Y^T, each [b c d d], and |Y|^2 [b c]."""
    tokens = reach.unfold(1, window, every).mT
    early, late = tokens[..., :-1, :].contiguous(), tokens[..., 1:, :].contiguous()
    return early.mT @ early, early.mT @ late, (late.square().sum(dim=-1) * there).sum(dim=-1)


class _InnerProducts(torch.autograd.Function):
    """The product x x^T [.. w w] of x [.. w d]. Its backward takes one product; autograd's takes two."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x @ x.mT

    @staticmethod
    @without_autocast
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return (grad + grad.mT) @ x


def relative_cut(dtype: torch.dtype, longer: Tensor, p: int) -> Tensor:
    """Return the share of the largest eigenvalue of the Gram matrix below which eigenvalues are rounding: (longer side
    x eps)^2, or the float64 rounding of the Gram matrix itself if that is more.
    """
    eps = min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    return (longer.double() * eps).square().clamp(min=16 * p * torch.finfo(torch.float64).eps)


def captured_energy(gram: Tensor, cross: Tensor, cut: Tensor, rank: int | None = None) -> Tensor:
    """Return the sum over kept i, j of (v_i^T C v_j)^2 / l_i, with gram = V diag(l) V^T and cross = C.

    gram, cross: [.. p p] -> [..].

    Kept are the `rank` largest l, if above cut x the largest. cut [..] broadcasts.
    """
    energy = _TransformedEnergy if in_transform() else _CapturedEnergy
    return energy.apply(gram, cross, cut, rank)[0]


ONE_DERIVATIVE = "the DMD error cannot be differentiated twice"


class _CapturedEnergy(torch.autograd.Function):
    """The energy tr(P C^T G^+ C P), P the projector on the kept eigenvectors of G and G^+ the inverse there.

    Its derivative is that of functions of a symmetric matrix (Daleckii and Krein): for h(G) = V h(l) V^T,
    dh = V (F * (V^T dG V)) V^T with F_ij = (h(l_i) - h(l_j)) / (l_i - l_j). Between two kept directions that is 0 for
    P and -1 / (l_i l_j) for G^+: the gaps between them, which make the backward of `eigh` and `svd` explode, cancel.
    Gaps between kept and dropped directions remain; eigenvalues below the cut count as zero, equal ones are decoupled.
    """

    @staticmethod
    def forward(gram, cross, cut, rank):
        eigenvalues, vectors = torch.linalg.eigh(gram)
        floor = eigenvalues[..., -1:] * cut[..., None]
        kept = eigenvalues > floor
        eigenvalues = eigenvalues.where(kept, 0.0)
        if rank is not None and rank < kept.shape[-1]:
            kept = kept & (torch.arange(kept.shape[-1], 0, -1, device=kept.device) <= rank)
        cross = vectors.mT @ cross @ vectors
        inverse = _inverse(eigenvalues, kept)
        energy = (cross.square() * inverse[..., :, None] * kept[..., None, :]).sum(dim=(-1, -2))
        return energy, eigenvalues, vectors, kept, floor, cross

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        # gram and cross too, so that dependence on them is known
        ctx.save_for_backward(*inputs[:2], *output[1:])
        ctx.save_for_forward(*inputs[:2], *output[1:])

    @staticmethod
    @without_autocast
    def backward(ctx, grad, *_):
        slopes = (_TransformedSlope if in_transform() else _EnergySlope).apply(*ctx.saved_tensors)
        return *(slope * grad[..., None, None] for slope in slopes), None, None


class _EnergySlope(torch.autograd.Function):
    """The derivative of the energy with respect to gram and cross. It cannot be differentiated again."""

    @staticmethod
    def forward(gram, own_cross, eigenvalues, vectors, kept, floor, cross):
        inverse = _inverse(eigenvalues, kept)
        scaled = inverse[..., :, None] * cross
        grad_cross = 2 * scaled * kept[..., None, :]
        gap = eigenvalues[..., :, None] - eigenvalues[..., None, :]
        apart = kept[..., :, None] & ~kept[..., None, :] & (gap > floor[..., None])
        coupling = apart / gap.where(apart, 1.0)
        of_inverse = inverse[..., :, None] * coupling
        of_inverse = of_inverse + of_inverse.mT - inverse[..., :, None] * inverse[..., None, :]
        of_projector = coupling + coupling.mT
        grad_gram = of_inverse * ((cross * kept[..., None, :]) @ cross.mT) + of_projector * (cross.mT @ scaled)
        return tuple(vectors @ g @ vectors.mT for g in (grad_gram, grad_cross))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ONE_DERIVATIVE)


class _TransformedEnergy(_CapturedEnergy):
    """_CapturedEnergy for torch.func and forward mode, apart because torch.compile takes no function with a jvp."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, gram_t, cross_t, *_):
        slopes = _TransformedSlope.apply(*ctx.saved_tensors)
        energy_t = sum((slope * t).sum(dim=(-1, -2)) for slope, t in zip(slopes, (gram_t, cross_t), strict=True))
        return energy_t, *(None,) * (len(ctx.saved_tensors) - 2)


class _TransformedSlope(_EnergySlope):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError(ONE_DERIVATIVE)


def _inverse(eigenvalues: Tensor, kept: Tensor) -> Tensor:
    return kept / eigenvalues.where(kept, 1.0)


def _eigenvalues(x: Tensor, rank: int | None) -> Tensor:
    """Return eigenvalues of U^T Y V S^-1 for x [.. n d], complex [.. r], by an SVD of X itself."""
    n, d = x.shape[-2:]
    r = min(max(n - 1, 0), d, d if rank is None else rank)
    complex_dtype = torch.complex128 if x.dtype == torch.float64 else torch.complex64
    if r == 0:
        return torch.zeros(*x.shape[:-2], 0, dtype=complex_dtype, device=x.device)
    finite = x.isfinite().all(dim=-1).all(dim=-1)
    snapshots = torch.where(finite[..., None, None], x, 0.0).double().mT
    early, late = snapshots[..., :-1], snapshots[..., 1:]
    u, s, vh = torch.linalg.svd(early, full_matrices=False)
    eps = min(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)
    kept = s > s[..., :1] * (max(n - 1, d) * eps)
    inverse = (kept / s.where(kept, 1.0))[..., :r]
    operator = u[..., :r].mT @ late @ vh[..., :r, :].mT * inverse[..., None, :]
    return torch.where(finite[..., None], torch.linalg.eigvals(operator), complex(math.nan, math.nan)).to(complex_dtype)
