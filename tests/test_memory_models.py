"""The memory models: formulas written out, ways back against autograd, start values, wrong arguments."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from titans_pytorch import (
    FactorizedMemoryMLP,
    GatedResidualMemoryMLP,
    MemoryAttention,
    MemoryMLP,
    MemorySwiGluMLP,
    ResidualNorm,
)
from titans_pytorch.memory_models import MemoryModel, PolynomialMemoryMLP, PositiveMatrix, SwiGLU, fast_form

from .helpers import ForeignModel, GhostModel, assert_close, assert_same_gradients, gradients, message, randomise

DIM = 6


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def layer_norm(x, gamma):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (gamma + 1)


def mlp(x, p):
    for i in range(len(p)):
        x = (gelu(x) if i else x) @ p[f"weights.{i}"]
    return x


def factorized(x, p):
    for i in range(len(p) // 2):
        x = (gelu(x) if i else x) @ p[f"weights.{i}.0"] @ p[f"weights.{i}.1"]
    return x


def swiglu(x, p):
    for i in range(len(p) // 2):
        a, g = (x @ p[f"weights.{i}.0"]).chunk(2, -1)
        x = x + (a * gelu(g)) @ p[f"weights.{i}.1"]
    return layer_norm(x, p["norm.gamma"])


def gated_residual(x, p):
    for i in range(len(p) // 3):
        branch = gelu(x @ p[f"weights.{i}.0"]) @ p[f"weights.{i}.1"]
        gates = 1 / (1 + (-(torch.cat((branch, x), -1) @ p[f"weights.{i}.2"])).exp())
        x = x + gates * (branch - x)
    return x @ p["final_proj"]


def attention(x, p, scale=8.0):
    q, k, v = (x @ p[f"weights.{i}"] for i in range(3))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    # by hand: torch's own attention has no second derivative on every version
    scores = (q @ k.mT * scale).masked_fill(torch.ones(2 * (x.shape[-2],)).triu(1).bool(), -torch.inf)
    return scores.softmax(-1) @ v + gelu(x @ p["weights.3"]) @ p["weights.4"]


def wrapped_mlp(x, p):
    inner = {name.removeprefix("model."): value for name, value in p.items() if name.startswith("model.")}
    return layer_norm(mlp(x, inner), p["norm.gamma"]) + x


def polynomial(x, p):
    pairs = [x[..., i] * x[..., j] / (2**0.5 if i == j else 1) for i in range(DIM) for j in range(i, DIM)]
    return mlp(torch.cat((torch.ones_like(x[..., :1]), x, torch.stack(pairs, dim=-1)), dim=-1), p)


def positive(x, p):
    return (F.elu(x) + 1) @ p["weight"]


def silu_glu(x, p):
    return (F.silu(x @ p["weights.0"]) * (x @ p["weights.2"])) @ p["weights.1"]


def plain_norm(x, p):
    return layer_norm(mlp(x, {k.removeprefix("model."): v for k, v in p.items()}), torch.zeros(DIM)) + x


# name: (model, formula, the shape of each parameter)
MODELS = {
    "mlp": (lambda: MemoryMLP(DIM, 3), mlp, {"weights.0": (6, 12), "weights.1": (12, 12), "weights.2": (12, 6)}),
    "mlp, linear": (lambda: MemoryMLP(DIM, 1), mlp, {"weights.0": (6, 6)}),
    "mlp, odd width": (lambda: MemoryMLP(DIM, 2, 1.3), mlp, {"weights.0": (6, 7), "weights.1": (7, 6)}),
    "factorized": (
        lambda: FactorizedMemoryMLP(DIM, 2, k=4),
        factorized,
        {f"weights.{i}.{j}": ((6, 4), (4, 6))[j] for i in range(2) for j in range(2)},
    ),
    "factorized, k 32": (
        lambda: FactorizedMemoryMLP(DIM, 1),
        factorized,
        {"weights.0.0": (6, 32), "weights.0.1": (32, 6)},
    ),
    "swiglu": (
        lambda: MemorySwiGluMLP(DIM),
        swiglu,
        {"weights.0.0": (6, 32), "weights.0.1": (16, 6), "norm.gamma": (6,)},
    ),
    "swiglu, deep": (
        lambda: MemorySwiGluMLP(DIM, 2, 1.1),
        swiglu,
        {f"weights.{i}.{j}": ((6, 8), (4, 6))[j] for i in range(2) for j in range(2)} | {"norm.gamma": (6,)},
    ),
    "gated residual": (
        lambda: GatedResidualMemoryMLP(DIM, 2, 1.5),
        gated_residual,
        {f"weights.{i}.{j}": ((6, 9), (9, 6), (12, 6))[j] for i in range(2) for j in range(3)} | {"final_proj": (6, 6)},
    ),
    "attention": (
        lambda: MemoryAttention(DIM),
        attention,
        {f"weights.{i}": (6, 6) for i in range(3)} | {"weights.3": (6, 12), "weights.4": (12, 6)},
    ),
    "polynomial": (lambda: PolynomialMemoryMLP(DIM, 2), polynomial, {"weights.0": (28, 12), "weights.1": (12, 6)}),
    "positive": (lambda: PositiveMatrix(DIM), positive, {"weight": (6, 6)}),
    "silu glu": (
        lambda: SwiGLU(DIM, 1.5),
        silu_glu,
        {"weights.0": (6, 9), "weights.1": (9, 6), "weights.2": (6, 9)},
    ),
    "plain norm": (lambda: ResidualNorm(DIM, MemoryMLP(DIM, 1), gain=False), plain_norm, {"model.weights.0": (6, 6)}),
    "wrapped": (
        lambda: ResidualNorm(DIM, MemoryMLP(DIM, 2)),
        wrapped_mlp,
        {"norm.gamma": (6,), "model.weights.0": (6, 12), "model.weights.1": (12, 6)},
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)


class Taped:
    """A module's own parameters, with the way back; keeps what each gradient is made of."""

    def __init__(self, module):
        self.params, self.grads = dict(module.named_parameters()), {}

    def _back(self, name, grad):
        self.grads[name] = self.grads.get(name, 0.0) + grad

    def matmul(self, x, name):
        def back(dy):
            self._back(name, x.flatten(0, -2).mT @ dy.flatten(0, -2))
            return dy @ self.params[name].mT

        return x @ self.params[name], back

    def mul(self, x, name):
        def back(dy):
            self._back(name, (x * dy).flatten(0, -2).sum(0))
            return dy * self.params[name]

        return x * self.params[name], back


def example(name, *shape):
    model = randomise(MODELS[name][0]().double(), scale=0.2)
    generator = torch.Generator().manual_seed(1)
    return model, torch.randn(*shape, DIM, generator=generator, dtype=torch.float64)


@each_model
@pytest.mark.parametrize("shape", [(5,), (2, 1), (2, 3, 4)], ids=str)
def test_formula(name, shape):
    model, x = example(name, *shape)
    leaves = dict(model.named_parameters()) | {"x": x.requires_grad_()}
    got, wanted = model(x), MODELS[name][1](x, dict(model.named_parameters()))
    assert_close(got, wanted, 1e-11)
    assert_same_gradients(gradients([got], leaves), gradients([wanted], leaves), 1e-9)


@each_model
def test_way_back(name):
    """with_vjp's gradients, of input and parameters, and their own slopes, against autograd of the formula."""
    model, x = example(name, 3, 5)
    params = dict(model.named_parameters())
    leaves = params | {"x": x.requires_grad_()}
    wanted = MODELS[name][1](x, params)
    taped = Taped(model)
    y, back = model.with_vjp(x, taped)
    assert_close(y, wanted, 1e-11)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    wanted_grads = dict(
        zip(leaves, torch.autograd.grad(wanted, list(leaves.values()), dy, create_graph=True), strict=True)
    )
    got_grads = {"x": back(dy)} | taped.grads
    assert set(got_grads) == set(leaves)
    assert_same_gradients(got_grads, wanted_grads, 1e-9)
    leaves = leaves | {"dy": dy}
    slopes, wanted_slopes = (gradients([g[k] for k in wanted_grads], leaves) for g in (got_grads, wanted_grads))
    assert_same_gradients(slopes, wanted_slopes, 1e-8, "slope of the")


@each_model
def test_parameters(name):
    """Names, shapes, and start values: xavier-uniform, but standard normal in the SwiGLU; gammas at zero."""
    torch.manual_seed(0)
    build, _, shapes = MODELS[name]
    drawn = [dict(build().named_parameters()) for _ in range(200)]
    assert {k: tuple(p.shape) for k, p in drawn[0].items()} == shapes
    for key, shape in shapes.items():
        values = torch.stack([params[key].detach() for params in drawn])
        if key.endswith("gamma") or name == "positive":
            assert (values == 0).all()
            continue
        bound = math.sqrt(6 / sum(shape))
        std = 1.0 if name.startswith("swiglu") else bound / math.sqrt(3)
        assert values.std().item() == pytest.approx(std, rel=0.03)
        assert abs(values.mean().item()) < 0.06 * std
        if not name.startswith("swiglu"):
            assert 0.97 * bound < values.abs().max() <= bound
        assert len({params[key].sum().item() for params in drawn}) == 200


@pytest.mark.parametrize("name", [name for name in MODELS if name != "attention"])
def test_tokenwise_models_look_at_one_token(name):
    model, x = example(name, 5)
    assert model.tokenwise
    assert_close(model(x)[2:3], model(x[2:3]), 1e-12)


def test_attention_looks_back_only():
    model, x = example("attention", 5)
    assert not model.tokenwise
    y = model(x)
    assert (model(x[1:])[1] - y[2]).abs().max() > 1e-6
    x[3:] = 9.0
    assert_close(model(x)[:3], y[:3], 1e-12)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: MemoryMLP(0, 2), "dim must be ..., got 0"),
        (lambda: MemoryMLP(4, 0), "depth must be ..., got 0"),
        (lambda: MemoryMLP(4, 1.0), "depth must be ..., got 1.0"),
        (lambda: MemoryMLP(4, 2, 0.0), "expansion_factor must be ..., got 0.0"),
        (lambda: MemoryMLP(4, 2, "4"), "expansion_factor must be ..., got '4'"),
        (lambda: MemoryMLP(4, 2, 0.1), "expansion_factor must be ..., got 0.1"),
        (lambda: FactorizedMemoryMLP(4, 2, k=0), "k must be ..., got 0"),
        (lambda: FactorizedMemoryMLP(-4, 2), "dim must be ..., got -4"),
        (lambda: FactorizedMemoryMLP(4, 0), "depth must be ..., got 0"),
        (lambda: MemorySwiGluMLP(4, depth=0), "depth must be ..., got 0"),
        (lambda: MemorySwiGluMLP(4, expansion_factor=0.3), "expansion_factor must be ..., got 0.3"),
        (lambda: MemorySwiGluMLP(4, expansion_factor=-1.0), "expansion_factor must be ..., got -1.0"),
        (lambda: GatedResidualMemoryMLP(4, None), "depth must be ..., got None"),
        (lambda: GatedResidualMemoryMLP(4, 1, 0.2), "expansion_factor must be ..., got 0.2"),
        (lambda: MemoryAttention(4.0), "dim must be ..., got 4.0"),
        (lambda: MemoryAttention(4, scale=0), "scale must be ..., got 0"),
        (lambda: PolynomialMemoryMLP(4, 2, degree=3), "degree must be ..., got 3"),
        (lambda: PolynomialMemoryMLP(4, 0), "depth must be ..., got 0"),
        (lambda: PositiveMatrix(0), "dim must be ..., got 0"),
        (lambda: SwiGLU(4, 0.1), "expansion_factor must be ..., got 0.1"),
        (lambda: ResidualNorm(4, MemoryMLP(4, 1), gain="no"), "gain must be ..., got 'no'"),
        (lambda: MemoryAttention(4, expansion_factor=0.1), "expansion_factor must be ..., got 0.1"),
    ],
)
def test_wrong_arguments_are_named(build, named):
    with pytest.raises(ValueError, match=message(named)):
        build()


class Doubled(MemoryMLP):
    """Says with `forward` what it computes, not with `with_vjp`."""

    def forward(self, x):
        return 2 * super().forward(x)


class Renormed(ResidualNorm):
    def forward(self, x):
        return super().forward(x).tanh()


class ForwardOnly(MemoryModel):
    """A model of one's own on the shipped base, in the documented form: no way back."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))

    def with_weights(self, x, weights):
        return weights.matmul(x, "weight")


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3, 3))

    def with_weights(self, x, weights):
        return x


@pytest.mark.parametrize(
    ("model", "form"),
    [
        (MemoryMLP(4, 2), "taped"),
        (ResidualNorm(4, MemoryAttention(4)), "taped"),
        (GhostModel(4), "ghost"),
        (ResidualNorm(4, GhostModel(4)), "ghost"),
        (ForeignModel(4), None),
        (ResidualNorm(4, ForeignModel(4)), None),
        (Doubled(4, 2), None),
        (ResidualNorm(4, Doubled(4, 2)), None),
        (Renormed(4, MemoryMLP(4, 2)), None),
        (ForwardOnly(), "ghost"),
        (Stacked(), None),
    ],
)
def test_how_a_model_can_be_differentiated(model, form):
    assert fast_form(model) == form
