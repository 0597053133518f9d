"""Memory networks: [.. n d] -> [.. n d], parameters stored [in, out].

Each network is written once, in `with_vjp(x, weights)`: the output at x and the function for the backward pass, with
every parameter used through `weights.matmul(x, name)` or `weights.mul(x, name)`. `weights` decides what a parameter is:
the module's own parameter (forward), the mini-batch start weights (with a record of the factors of the gradient), or
fast weights that are never built (see engines). A network of your own may define `with_weights(x, weights)`, which is
the forward pass alone. A network with neither method runs on the slower sequential engine.

`tokenwise`: a token's output depends on that token alone. If it is False (the default for a network of your own), reads
see the earlier queries of their read group, and the memory's state carries these.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from titans_pytorch.common.checks import Words, flags, of_kind, positive_int, positive_number, wrong
from titans_pytorch.common.names import known_keywords
from titans_pytorch.ops import vjp


class TapedWeights(Protocol):
    """The weights given to `with_vjp`. Both methods return (y, back); back maps the gradient of y to that of x."""

    def matmul(self, x: Tensor, name: str):
        """x [.. d] @ W, the parameter of that name [d d']."""

    def mul(self, x: Tensor, name: str):
        """x [.. d] * w, the parameter of that name [d]."""


class Weights(Protocol):
    """The weights given to `with_weights`."""

    def matmul(self, x: Tensor, name: str) -> Tensor:
        """x [.. d] @ W, the parameter of that name [d d']."""

    def mul(self, x: Tensor, name: str) -> Tensor:
        """x [.. d] * w, the parameter of that name [d]."""


class Untaped:
    """Plain `Weights` for `with_vjp` where only its output is needed."""

    def __init__(self, weights: Weights):
        self.weights = weights

    def matmul(self, x, name):
        return self.weights.matmul(x, name), None

    def mul(self, x, name):
        return self.weights.mul(x, name), None


class Scoped:
    """The weights of a submodule: names with its prefix."""

    def __init__(self, weights, prefix: str):
        self.weights, self.prefix = weights, prefix

    def matmul(self, x, name):
        return self.weights.matmul(x, self.prefix + name)

    def mul(self, x, name):
        return self.weights.mul(x, self.prefix + name)


class OwnWeights:
    """A module's own parameters."""

    def __init__(self, module: nn.Module):
        self.params = dict(module.named_parameters())

    def matmul(self, x, name):
        return x @ self.params[name]

    def mul(self, x, name):
        return x * self.params[name]


class MemoryModel(nn.Module):
    """Base of the shipped models: one definition, `with_vjp`, serves every use."""

    tokenwise = True
    dim: int | None = None  # features of a token; None: any number

    @property
    def matrix(self) -> str | None:
        """The name of W, where the network is features(x) @ W and has no other parameter; None for other networks."""
        return None

    def features(self, x: Tensor) -> Tensor:
        """Return the input of that W; by default x itself, [.. n d]."""
        return x

    def with_vjp(self, x: Tensor, weights: TapedWeights):
        """Return (y [.. n d], back); back maps the gradient of y to the gradient of x. Every parameter is used through
        `weights`, by its name: `weights.matmul(x, name)`, `weights.mul(x, name)`.
        """
        raise NotImplementedError

    def with_weights(self, x: Tensor, weights: Weights) -> Tensor:
        """Return the output [.. n d] at x with parameters used through `weights`."""
        return self.with_vjp(x, Untaped(weights))[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return the output [.. n d] at x [.. n d] with the module's own parameters."""
        check_features(x, self.dim)
        return self.with_weights(x, OwnWeights(self))


def check_features(x: Tensor, dim: int | None) -> None:
    """Raise ValueError unless x holds floating point tokens [.. n dim]."""
    takes = f"a floating point tensor [.. n {'d' if dim is None else dim}]"
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise wrong("x", Words(x.dtype if isinstance(x, Tensor) else type(x).__name__), takes)
    if x.ndim < 2 or dim not in (None, x.shape[-1]):
        raise wrong("x", tuple(x.shape), takes)


def _inner_width(dim: int, expansion_factor: float, times: int = 1, over: int = 1) -> int:
    width = int(positive_int(dim, "dim") * positive_number(expansion_factor, "expansion_factor") * times / over)
    if width < 1:
        raise wrong("expansion_factor", expansion_factor, f"one that leaves at least one inner feature at dim = {dim}")
    return width


def _matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(shape)))


class LayerNormGamma(MemoryModel):
    """LayerNorm without affine, times (gamma + 1); gamma [dim] starts at zero."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = positive_int(dim, "dim")
        self.gamma = nn.Parameter(torch.zeros(dim))

    def with_vjp(self, x, weights):
        normed, back_norm = vjp.layer_norm(x)
        scaled, back_mul = weights.mul(normed, "gamma")
        return scaled + normed, lambda dy: back_norm(back_mul(dy) + dy)


class PlainLayerNorm(MemoryModel):
    """LayerNorm without parameters."""

    def with_vjp(self, x, weights):
        return vjp.layer_norm(x)


class ResidualNorm(MemoryModel):
    """The wrapper around a memory network: LayerNorm(model(x)) * (gamma + 1) + x, eps 1e-5; gamma [dim] starts at zero.

    From titans-pytorch; the paper has neither norm nor residual.

    Args:
        dim: features of a token.
        model: [.. n dim] -> [.. n dim].
        gain: add gamma, one more fast weight; without it LayerNorm(model(x)) + x, as in TTT (arXiv 2407.04620, section
            2.7) and MIRAS (arXiv 2504.13173, section 5.3).
    """

    def __init__(self, dim: int, model: nn.Module, gain: bool = True):
        super().__init__()
        flags(gain=gain)
        self.norm = LayerNormGamma(dim) if gain else PlainLayerNorm()
        self.dim, self.model = dim, of_kind(model, nn.Module, "model", "a torch.nn.Module")

    @property
    def tokenwise(self):
        """Whether a token's output depends on that token alone; the model decides."""
        return getattr(self.model, "tokenwise", False)

    def with_vjp(self, x, weights):
        y, back_model = self.model.with_vjp(x, Scoped(weights, "model."))
        y, back_norm = self.norm.with_vjp(y, Scoped(weights, "norm."))
        return y + x, lambda dy: back_model(back_norm(dy)) + dy

    def with_weights(self, x, weights):
        y = self.model.with_weights(x, Scoped(weights, "model."))
        return self.norm.with_weights(y, Scoped(weights, "norm.")) + x

    def forward(self, x):
        """Return the output [.. n d] at x [.. n d]."""
        check_features(x, self.dim)
        return self.norm(self.model(x)) + x


@known_keywords
class MemoryMLP(MemoryModel):
    """x W_0, then gelu before each further W; widths dim, int(dim * expansion_factor) ..., dim.

    The memory of Titans (arXiv 2501.00663, section 3.1: L_M layers; one layer is a matrix-valued memory). Weights start
    Xavier-uniform.

    Args:
        dim: features of a token.
        depth: matrices, L_M.
        expansion_factor: hidden width as a multiple of dim.

    Raises:
        ValueError: for an argument of the wrong type, shape or range, by name.
    """

    def __init__(self, dim: int, depth: int, expansion_factor: float = 2.0):
        super().__init__()
        self.dim, inner = dim, _inner_width(dim, expansion_factor)
        widths = (dim, *(inner,) * (positive_int(depth, "depth") - 1), dim)
        self.weights = nn.ParameterList([_matrix(i, o) for i, o in zip(widths[:-1], widths[1:], strict=True)])

    @property
    def matrix(self) -> str | None:
        """Its one matrix, at depth 1."""
        return "weights.0" if len(self.weights) == 1 and type(self).with_vjp is MemoryMLP.with_vjp else None

    def with_vjp(self, x, weights):
        return _mlp_with_vjp(x, weights, len(self.weights), [])


@known_keywords
class PolynomialMemoryMLP(MemoryModel):
    """An MLP of the monomials of x: phi(x) W_0, then gelu before each further W; the widths after phi are int(dim *
    expansion_factor) ..., dim.

    phi(x) are all monomials up to a degree, scaled so that phi(q) . phi(k) is the sum of (q . k)^i / i! over i = 0 ..
    degree, the beginning of exp(q . k) (Atlas, arXiv 2505.23735, section 3.1). Weights start Xavier-uniform.

    Args:
        dim: features of a token.
        depth: matrices.
        degree: the largest degree, 1 or 2: phi(x) has 1 + dim, or 1 + dim + dim (dim + 1) / 2 features.
        expansion_factor: hidden width as a multiple of dim.

    Raises:
        ValueError: for an argument of the wrong type, shape or range, by name.
    """

    def __init__(self, dim: int, depth: int, degree: int = 2, expansion_factor: float = 2.0):
        super().__init__()
        if positive_int(degree, "degree") > 2:
            raise wrong("degree", degree, "1 or 2")
        self.dim, inner = dim, _inner_width(dim, expansion_factor)
        self.degree = degree
        features = 1 + dim + (dim * (dim + 1) // 2 if degree == 2 else 0)
        widths = (features, *(inner,) * (positive_int(depth, "depth") - 1), dim)
        self.weights = nn.ParameterList([_matrix(i, o) for i, o in zip(widths[:-1], widths[1:], strict=True)])

    @property
    def matrix(self) -> str | None:
        """Its one matrix, at depth 1."""
        return "weights.0" if len(self.weights) == 1 else None

    def features(self, x: Tensor) -> Tensor:
        """phi(x)."""
        return vjp.monomials(x, self.degree)[0]

    def with_vjp(self, x, weights):
        x, back = vjp.monomials(x, self.degree)
        return _mlp_with_vjp(x, weights, len(self.weights), [back])


@known_keywords
class PositiveMatrix(MemoryModel):
    """phi(x) W with phi = elu + 1: the matrix of linear attention (arXiv 2006.16236, eq. 7). W [dim, dim] starts at
    zero.

    Args:
        dim: features of a token.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dim = positive_int(dim, "dim")
        self.weight = nn.Parameter(torch.zeros(dim, dim))

    @property
    def matrix(self) -> str:
        """W."""
        return "weight"

    def features(self, x: Tensor) -> Tensor:
        """phi(x)."""
        return vjp.elu_plus_one(x)[0]

    def with_vjp(self, x, weights):
        features, back_features = vjp.elu_plus_one(x)
        y, back = weights.matmul(features, "weight")
        return y, lambda dy: back_features(back(dy))


@known_keywords
class SwiGLU(MemoryModel):
    """(silu(x W_0) * (x W_2)) W_1, without residual or norm: the memory network of LaCT (arXiv 2505.23884, eq. 6).

    Weights start Xavier-uniform.

    Args:
        dim: features of a token.
        expansion_factor: the inner width as a multiple of dim.

    Raises:
        ValueError: for an argument of the wrong type, shape or range, by name.
    """

    def __init__(self, dim: int, expansion_factor: float = 1.0):
        super().__init__()
        self.dim, inner = dim, _inner_width(dim, expansion_factor)
        self.weights = nn.ParameterList([_matrix(dim, inner), _matrix(inner, dim), _matrix(dim, inner)])

    def with_vjp(self, x, weights):
        pre, back_pre = weights.matmul(x, "weights.0")
        other, back_other = weights.matmul(x, "weights.2")
        gate, back_gate = vjp.silu(pre)
        y, back_down = weights.matmul(gate * other, "weights.1")

        def back(dy):
            hidden = back_down(dy)
            return back_pre(back_gate(hidden * other)) + back_other(hidden * gate)

        return y, back


@known_keywords
class FactorizedMemoryMLP(MemoryModel):
    """x A_j B_j per layer, A [dim, k], B [k, dim]; gelu before each layer but the first.

    From titans-pytorch. Weights start Xavier-uniform.

    Args:
        dim: features of a token.
        depth: layers.
        k: rank of each layer.

    Raises:
        ValueError: for an argument of the wrong type, shape or range, by name.
    """

    def __init__(self, dim: int, depth: int, k: int = 32):
        super().__init__()
        self.dim = positive_int(dim, "dim")
        positive_int(k, "k")
        self.weights = nn.ModuleList(
            [nn.ParameterList([_matrix(dim, k), _matrix(k, dim)]) for _ in range(positive_int(depth, "depth"))]
        )

    def with_vjp(self, x, weights):
        backs = []
        for i in range(len(self.weights)):
            if i > 0:
                x, back = vjp.gelu(x)
                backs.append(back)
            for j in (0, 1):
                x, back = weights.matmul(x, f"weights.{i}.{j}")
                backs.append(back)
        return x, _chain(backs)


@known_keywords
class MemorySwiGluMLP(MemoryModel):
    """x + (a * gelu(g)) W_2 per layer, (a, g) the halves of x W_1; LayerNorm times (gamma + 1) at the end.

    A gated feed-forward (arXiv 2002.05202) as memory; from titans-pytorch. Weights start standard normal.

    Args:
        dim: features of a token.
        depth: layers.
        expansion_factor: the inner width is int(dim * expansion_factor * 2 / 3).

    Raises:
        ValueError: for an argument of the wrong type, shape or range, by name.
    """

    def __init__(self, dim: int, depth: int = 1, expansion_factor: float = 4.0):
        super().__init__()
        self.dim, inner = dim, _inner_width(dim, expansion_factor, 2, 3)

        def layer():
            shapes = ((dim, inner * 2), (inner, dim))
            return nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

        self.weights = nn.ModuleList([layer() for _ in range(positive_int(depth, "depth"))])
        self.norm = LayerNormGamma(dim)

    def with_vjp(self, x, weights):
        backs = []
        for i in range(len(self.weights)):
            x, back = self._layer(x, weights, i)
            backs.append(back)
        x, back = self.norm.with_vjp(x, Scoped(weights, "norm."))
        return x, _chain([*backs, back])

    @staticmethod
    def _layer(x, weights, i):
        both, back_up = weights.matmul(x, f"weights.{i}.0")
        a, g = both.chunk(2, dim=-1)
        act, back_gelu = vjp.gelu(g)
        y, back_down = weights.matmul(a * act, f"weights.{i}.1")

        def back(dy):
            dh = back_down(dy)
            return dy + back_up(torch.cat((dh * act, back_gelu(dh * a)), dim=-1))

        return x + y, back


@known_keywords
class GatedResidualMemoryMLP(MemoryModel):
    """branch = gelu(x W_1) W_2; gates = sigmoid([branch, x] W_g), W_g [2 dim, dim]; x + gates (branch - x) per layer; a
    dim x dim projection at the end.

    From titans-pytorch. Weights start Xavier-uniform.

    Args:
        dim: features of a token.
        depth: layers.
        expansion_factor: hidden width of a branch as a multiple of dim.

    Raises:
        ValueError: for an argument of the wrong type, shape or range, by name.
    """

    def __init__(self, dim: int, depth: int, expansion_factor: float = 4.0):
        super().__init__()
        self.dim, inner = dim, _inner_width(dim, expansion_factor)
        self.weights = nn.ModuleList(
            [
                nn.ParameterList([_matrix(dim, inner), _matrix(inner, dim), _matrix(dim * 2, dim)])
                for _ in range(positive_int(depth, "depth"))
            ]
        )
        self.final_proj = _matrix(dim, dim)

    def with_vjp(self, x, weights):
        backs = []
        for i in range(len(self.weights)):
            x, back = self._layer(x, weights, i)
            backs.append(back)
        x, back = weights.matmul(x, "final_proj")
        return x, _chain([*backs, back])

    @staticmethod
    def _layer(x, weights, i):
        hidden, back_up = weights.matmul(x, f"weights.{i}.0")
        act, back_gelu = vjp.gelu(hidden)
        branch, back_down = weights.matmul(act, f"weights.{i}.1")
        pre, back_gate = weights.matmul(torch.cat((branch, x), dim=-1), f"weights.{i}.2")
        gates, back_sigmoid = vjp.sigmoid(pre)
        step = branch - x

        def back(dy):
            dbranch, dx = back_gate(back_sigmoid(dy * step)).chunk(2, dim=-1)
            kept = gates * dy
            return dy - kept + dx + back_up(back_gelu(back_down(dbranch + kept)))

        return x + gates * step, back


@known_keywords
class MemoryAttention(MemoryModel):
    """Causal attention among the tokens of one chunk, q and k of unit norm, in parallel with gelu(x F_1) F_2.

    Its reads depend on the other queries of the read group, so it is not tokenwise. From titans-pytorch, whose reads
    put a zero query in front. Weights start Xavier-uniform.

    Args:
        dim: features of a token.
        scale: factor of the attention scores.
        expansion_factor: width of F_1 as a multiple of dim.

    Raises:
        ValueError: for an argument of the wrong type, shape or range, by name.
    """

    tokenwise = False

    def __init__(self, dim: int, scale: float = 8.0, expansion_factor: float = 2.0):
        super().__init__()
        self.scale = positive_number(scale, "scale")
        self.dim, inner = dim, _inner_width(dim, expansion_factor)
        shapes = ((dim, dim), (dim, dim), (dim, dim), (dim, inner), (inner, dim))
        self.weights = nn.ParameterList([_matrix(*shape) for shape in shapes])

    def with_vjp(self, x, weights):
        pairs = [weights.matmul(x, f"weights.{i}") for i in range(4)]
        (q, k, v, hidden), (back_q, back_k, back_v, back_up) = zip(*pairs, strict=True)
        (q, back_qn), (k, back_kn) = vjp.unit_norm(q), vjp.unit_norm(k)
        attended, back_attend = vjp.causal_attention(q, k, v, self.scale)
        act, back_gelu = vjp.gelu(hidden)
        y, back_down = weights.matmul(act, "weights.4")

        def back(dy):
            dq, dk, dv = back_attend(dy)
            return back_q(back_qn(dq)) + back_k(back_kn(dk)) + back_v(dv) + back_up(back_gelu(back_down(dy)))

        return attended + y, back


def fast_form(model: nn.Module) -> str | None:
    """Return how the chunkwise engine differentiates a network: "taped" (with_vjp) or "ghost" (with_weights). None: it
    cannot, only the sequential engine can.

    A network of this file whose `forward` was overridden gives None: its `with_vjp` may no longer agree with it.
    """
    if any(p.ndim > 2 for p in model.parameters()):
        return None
    if isinstance(model, ResidualNorm):
        return fast_form(model.model) if type(model).forward is ResidualNorm.forward else None
    if isinstance(model, MemoryModel):
        if type(model).forward is not MemoryModel.forward:
            return None
        return "ghost" if type(model).with_vjp is MemoryModel.with_vjp else "taped"
    return "ghost" if hasattr(model, "with_weights") else None


def _mlp_with_vjp(x: Tensor, weights: Any, count: int, backs: list) -> tuple[Tensor, Callable]:
    """x W_0, then gelu before each further W, behind the products whose ways back are `backs`."""
    for i in range(count):
        if i > 0:
            x, back = vjp.gelu(x)
            backs.append(back)
        x, back = weights.matmul(x, f"weights.{i}")
        backs.append(back)
    return x, _chain(backs)


def _chain(backs):
    def back(dy):
        for step in reversed(backs):
            dy = step(dy)
        return dy

    return back
