"""Law 8 of the memory: it can be differentiated by every means that torch has, and all give the same numbers.

Functions with a backward pass of their own are where torch.func and forward-mode AD go wrong.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

from titans_pytorch import MemoryMLP, NeuralMemory
from titans_pytorch.models.config import VARIANTS as FAMILY
from titans_pytorch.models.config import ModelConfig
from titans_pytorch.models.family import build_model

from ..helpers import assert_close, assert_same_gradients, gradients, randomise
from ..mac_options import build, draw_ids
from .subjects import Subject, huber, option_sets, tolerance
from .test_memory_modes import PLAIN, VARIANTS

pytestmark = pytest.mark.filterwarnings("ignore:.*(torch.jit|performance drop).*")
ROWS = 2


def own_loss(prediction, target):
    """torch has no forward mode of the backward pass of Huber's loss."""
    return (prediction - target).square().add(1.0).sqrt().mean(dim=-1)


class OfRows(nn.Module):
    """A subject in two calls, the state carried: (sums of squares of what is read and of surprises)."""

    def __init__(self, options, engine="auto"):
        super().__init__()
        options = dict(options)
        if options["store_memory_loss_fn"] is huber:
            options["store_memory_loss_fn"] = own_loss
        self.subject = [Subject(options, engine)]
        self.memories = nn.ModuleList([m for m in (self.subject[0].memory, self.subject[0].earlier) if m is not None])
        self.tolerance = 100 * tolerance(options)

    def forward(self, seq):
        out, _, surprises = self.subject[0].pieces(seq.unsqueeze(-3), [4])
        return out.square().sum() + sum(x.square().sum() for x in surprises)


def agrees(model: nn.Module, rows, tolerance: float, *args, forward_mode: bool = True):
    """Per-sample gradients, and a derivative forward, are those of ordinary calls."""
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    rest = {k: p.detach() for k, p in model.named_parameters() if not p.requires_grad}
    params = {k: p.detach() for k, p in trained.items()}

    def loss(params, row):
        return functional_call(model, {**params, **rest}, (row, *args))

    each = vmap(grad(loss), in_dims=(None, 0))(params, rows)
    for i, row in enumerate(rows):
        wanted = gradients([model(row, *args)], trained, seed=0)
        scale = torch.randn((), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        wanted = {name: g / scale for name, g in wanted.items()}
        assert_same_gradients({name: g[i] for name, g in each.items()}, wanted, tolerance)
    if not forward_mode:
        return
    generator = torch.Generator().manual_seed(7)
    turn = {k: torch.randn(p.shape, generator=generator, dtype=p.dtype) for k, p in params.items()}
    wanted = sum((turn[name] * g).sum() for name, g in wanted.items())
    assert_close(jvp(lambda p: loss(p, rows[-1]), (params,), (turn,))[1], wanted, tolerance)
    with forward_ad.dual_level(), torch.no_grad():
        duals = {k: forward_ad.make_dual(p, turn[k]) for k, p in params.items()}
        assert_close(forward_ad.unpack_dual(loss(duals, rows[-1])).tangent, wanted, tolerance)


def rows_of(model: OfRows, n: int = 7):
    return model.subject[0].sequence(ROWS, n).movedim(-3, 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_torch_func(variant):
    options = dict(VARIANTS[variant])
    model = OfRows({**PLAIN, **options}, options.pop("engine", "auto"))
    agrees(model, rows_of(model), model.tolerance)


@pytest.mark.parametrize("engine", ["auto", "dual", "matrix", "reference"])
def test_torch_func_of_engines(engine):
    model = OfRows({**PLAIN, "batch_chunks": 2, "momentum_order": 2}, engine)
    agrees(model, rows_of(model), model.tolerance)


@settings(max_examples=5, suppress_health_check=list(HealthCheck))
@given(options=option_sets)
def test_torch_func_of_any_options(options):
    model = OfRows(options)
    agrees(model, rows_of(model), model.tolerance)


@pytest.mark.parametrize("engine", ["dual", "matrix", "reference"])
def test_second_derivatives(engine):
    """Forward over reverse, reverse twice, and ordinary autograd twice: as differences of the gradient say."""
    torch.manual_seed(0)
    options = {"chunk_size": 2, "batch_size": 4, "qk_rmsnorm": True, "max_grad_norm": 0.5, "engine": engine}
    memory = randomise(NeuralMemory(3, model=MemoryMLP(3, 2, 1.5), **options).double(), 0, 0.2)
    x, turn = torch.randn(2, 1, 5, 3, dtype=torch.float64)

    def loss(x):
        return memory(x)[0].square().sum()

    wanted = hessian(loss)(x)
    assert_close(jacrev(jacrev(loss))(x), wanted)
    assert_close(torch.autograd.functional.hessian(loss, x), wanted)
    after, before = (
        torch.autograd.grad(loss(y), y)[0] for y in ((x + e * turn).requires_grad_() for e in (1e-6, -1e-6))
    )
    assert_close(torch.einsum("...bnd,bnd->...", wanted, turn), (after - before) / 2e-6, 1e-7)


def test_dmd_gating_has_one_derivative():
    memory = NeuralMemory(3, chunk_size=2, use_dmd_gating=True).double()
    x = torch.randn(1, 5, 3, dtype=torch.float64)
    for second in (hessian, lambda f: lambda x: torch.autograd.functional.hessian(f, x)):
        with pytest.raises(RuntimeError, match="the DMD error cannot be differentiated twice"):
            second(lambda x: memory(x)[0].square().sum())(x)


def test_vjp_of_the_input_and_what_is_counted():
    """A transform takes a pure function: the counter of pages stands still."""
    options = {"use_symplectic_gating": True, "num_pages": 2, "symplectic_page_threshold": 0.05}
    memory = randomise(NeuralMemory(4, chunk_size=2, **options).double())
    x = torch.randn(2, 8, 4, dtype=torch.float64, requires_grad=True)
    out = memory(x)[0]
    counted = memory.page_switch_events.clone()
    assert counted > 0
    again, back = vjp(lambda x: memory(x)[0], x)
    assert torch.equal(memory.page_switch_events, counted)
    assert_close(again, out)
    assert_close(back(torch.ones_like(out))[0], torch.autograd.grad(out.sum(), x)[0])


MAC = [
    {"num_longterm_mem_tokens": 1, "num_persist_mem_tokens": 1, "num_residual_streams": 1},
    {
        **{"sliding_window_attn": True, "neural_mem_weight_residual": True, "neural_mem_gate_attn_output": True},
        **{"neural_memory_qkv_receives_diff_views": True, "neural_memory_segment_len": 2, "batches": 2},
    },
    {"gates": "keyed"},
]


class LossOfOne(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids.unsqueeze(0), return_loss=True)


@pytest.mark.parametrize("options", MAC, ids=str)
def test_torch_func_of_the_transformer(options):
    model = build({"depth": 2, "segment_len": 3, "neural_memory_kwargs": {}, **options})
    agrees(LossOfOne(model), draw_ids(2, 9), 1e-7)


@pytest.mark.parametrize("variant", FAMILY)
def test_torch_func_of_the_family(variant):
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "d_model": 8, "n_layers": 2, "n_heads": 2, "mem_heads": 2, "n_persistent": 2}
    config = ModelConfig(variant=variant, window=4, chunk_size=4, memory_loss_weight=0.5, **sizes)
    # x-transformers chooses attention's kernel by itself: one without forward mode
    forward_mode = variant != "baseline"
    agrees(LossOfOne(build_model(config).double()), draw_ids(2, 9), 1e-7, forward_mode=forward_mode)
