"""Whatever is planted is found: the module, parameter, chunk and rate, in the right pass."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from tests.helpers import randomise
from titans_pytorch import (
    MemoryAsContextTransformer,
    MemoryMLP,
    ModelConfig,
    NeuralMemory,
    build_model,
    diagnose,
)
from titans_pytorch.analysis.overshoot import watch_gains
from titans_pytorch.common.switches import watched
from titans_pytorch.rules.base import UpdateRule

ENGINES = ["auto", "sequential"]


class Breaks(nn.Module):
    """x times 1, with a value or a gradient that is not finite where it is told so."""

    def __init__(self, how: str = ""):
        super().__init__()
        self.how, self.scale = how, nn.Parameter(torch.ones(()))

    def forward(self, x):
        if self.how == "output":
            return x * self.scale * math.nan
        if self.how == "input":  # the root of zero: the value is 0, the gradient is not
            return x * self.scale + (x * 0).square().sum().sqrt()
        if self.how == "parameter":
            return x * self.scale + (self.scale * 0).square().sqrt()
        return x * self.scale


def model_of(how: str, at: int) -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(4, 4), Breaks(how if i == at else ""), nn.Tanh()) for i in range(3)]
    return nn.Sequential(*blocks)


# any module


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize(
    ("how", "what", "phase"),
    [
        ("output", "output", "forward"),
        ("input", "gradient of the input", "backward"),
        ("parameter", "gradient of the parameter scale", "backward"),
    ],
)
def test_a_module(how, what, phase, at):
    model, x = model_of(how, at), torch.randn(2, 4)
    report = diagnose(model, x, loss=lambda out: out.square().sum())
    found = report.found
    assert (found.module, found.kind, found.what, found.dtype) == (f"{at}.1", "Breaks", what, torch.float32)
    assert found.phase == phase
    assert not report.finite
    assert f"the {what} of {at}.1 (Breaks), in float32: nan" in str(report)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_nothing():
    model, x = model_of("", 0), torch.randn(2, 4)
    report = diagnose(model, x)
    assert report.finite
    assert report.backward
    assert str(report) == "every value is finite, forward and backward"
    with torch.no_grad():
        report = diagnose(model, x)
    assert not report.backward
    assert str(report) == "every value is finite, forward (no backward pass was run)"
    assert not diagnose(model, x, backward=False).backward


def test_a_loss():
    report = diagnose(model_of("", 0), torch.randn(2, 4), loss=lambda out: out.sum() * math.inf)
    assert (report.found.module, report.found.what) == ("", "loss")
    model = model_of("", 0)
    report = diagnose(model, lambda: model(torch.ones(2, 4)).sum() * math.nan)
    assert (report.found.module, report.found.what) == ("", "loss")


def test_a_module_that_makes_infinity_finite_again_is_not_blamed():
    steep = nn.Linear(4, 4)
    steep.bias.data[2] = math.inf
    assert diagnose(nn.Sequential(steep, nn.Sigmoid()), torch.randn(2, 4)).finite
    report = diagnose(nn.Sequential(steep, nn.Sigmoid(), Breaks("output")), torch.randn(2, 4))
    assert report.found.module == "2"


def test_a_parameter_without_effect_is_named_as_harmless():
    embedding = nn.Embedding(8, 4)
    embedding.weight.data[5] = math.nan
    report = diagnose(embedding, torch.tensor([[1, 2, 3]]))
    assert report.finite
    assert math.isnan(report.harmless["weight"])
    assert "not finite, but harmless in this call: weight (nan)" in str(report)
    report = diagnose(embedding, torch.tensor([[1, 5, 3]]))
    assert (report.found.what, report.found.index, report.found.phase) == (
        "parameter weight",
        (5, 0),
        "before the call",
    )


@pytest.mark.parametrize("last", [0, 1, 2])
def test_of_modules_that_share_an_input_the_one_whose_gradient_breaks_is_named(last):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([Breaks("input" if i == last else "") for i in range(3)])

        def forward(self, x):
            return sum(part(x) for part in self.parts)

    report = diagnose(nn.Sequential(nn.Linear(4, 4), Sum()), torch.randn(2, 4))
    assert report.found.module == f"1.parts.{last}"


def test_the_precision_under_autocast():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.data.fill_(3e38)
    with torch.autocast("cpu", torch.bfloat16):
        found = diagnose(model, torch.rand(2, 4) + 1).found
    assert (found.module, found.dtype, found.value) == ("0", torch.bfloat16, math.inf)


def test_a_call_that_raises_after_the_value():
    class Decomposes(nn.Module):
        def forward(self, x):
            if not x.isfinite().all():
                raise RuntimeError("no decomposition")
            return x

    report = diagnose(nn.Sequential(Breaks("output"), Decomposes()), torch.randn(2, 4))
    assert report.found.module == "0"
    assert "the call then raised RuntimeError: no decomposition" in str(report)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        diagnose(nn.Linear(3, 3), torch.randn(2, 4))


def test_buffers_and_gradients_are_as_before():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model(torch.randn(8, 4)).sum().backward()
    before = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    diagnose(model, torch.randn(8, 4))
    assert all(torch.equal(x, before[0][name]) for name, x in model.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before[1], strict=True))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"^model must be a torch\.nn\.Module, got "):
        diagnose(len, torch.ones(1))
    with pytest.raises(ValueError, match="^inputs must be a tensor, .*, got int"):
        diagnose(nn.Linear(1, 1), 3)
    with pytest.raises(ValueError, match="^loss must be "):
        diagnose(nn.Linear(1, 1), torch.ones(1), loss=3)


# a memory


def memory_of(engine="auto", wrapped=True, **options) -> NeuralMemory:
    torch.manual_seed(0)
    defaults = {"chunk_size": 4, "batch_size": 8, "heads": 2, "dim_head": 4, "model": MemoryMLP(4, 2)}
    options = defaults | options
    return NeuralMemory(8, engine=engine, mem_model_norm_add_residual=wrapped, **options)


def tokens(n: int = 24) -> torch.Tensor:
    return torch.randn(2, n, 8, generator=torch.Generator().manual_seed(1))


variants = pytest.mark.parametrize(("engine", "wrapped"), [*itertools.product(ENGINES, [True, False])])


@variants
def test_every_parameter_of_a_memory(engine, wrapped):
    options = {"per_parameter_lr_modulation": True, "qk_rmsnorm": True, "post_rmsnorm": True, "qkv_conv_kernel": 2}
    options |= {"momentum_order": 2, "learned_momentum_combine": True, "attn_pool_chunks": True}
    memory = memory_of(engine, wrapped, gated_transition=True, **options)
    for name, p in memory.named_parameters():
        owner, _, own = name.rpartition(".")
        kept = p.detach().clone()
        p.data.view(-1)[-1] = math.nan
        found = diagnose(memory, tokens()).found
        assert found is not None, name
        at = tuple(size - 1 for size in p.shape)
        assert (found.module, found.what, found.index) == (owner, f"parameter {own}", at)
        p.data.copy_(kept)
    assert diagnose(memory, tokens()).finite


@variants
@pytest.mark.parametrize(
    ("rate", "what"),
    [
        ("to_momentum", "momentum"),
        ("to_decay_factor", "retention"),
        ("to_adaptive_step", "learning rate"),
        ("to_layer_modulation", "modulation"),
    ],
)
def test_the_bias_of_a_rate(engine, wrapped, rate, what):
    memory = memory_of(engine, wrapped, per_parameter_lr_modulation=True)
    getattr(memory.rates, rate).bias.data[-1] = math.nan
    report = diagnose(nn.ModuleDict({"a": memory})["a"], tokens())
    assert (report.memory.what, report.memory.chunk, report.memory.row, report.memory.head) == (what, 0, 0, 1)
    assert f"in the memory the {what} is not finite in chunk 0 (token" in str(report)


@variants
def test_an_initial_fast_weight(engine, wrapped):
    memory = memory_of(engine, wrapped)
    name = memory.memory_model_parameters.names[-1]
    memory.memory_model_parameters[-1].data[1, 2, 3] = math.inf
    report = diagnose(memory, tokens())
    assert report.found.what == f"parameter {len(memory.memory_model_parameters) - 1}"
    assert report.found.index == (1, 2, 3)
    place = report.memory
    assert (place.what, place.parameter, place.chunk, place.head) == ("fast weight at the start", name, 0, 1)


@variants
def test_an_input_token(engine, wrapped):
    x = tokens()
    x[1, 13, 3] = math.nan
    report = diagnose(memory_of(engine, wrapped), x)
    assert (report.found.what, report.found.index) == ("input", (1, 13, 3))
    assert str(report).endswith("check the inputs: row 1, token 13")


@variants
def test_an_infinite_learning_rate_logit_is_fine(engine, wrapped):
    memory = memory_of(engine, wrapped, default_step_transform_max_lr=0.01)
    memory.rates.to_adaptive_step.bias.data[0] = math.inf
    report = diagnose(memory, tokens())
    assert report.finite
    assert set(report.harmless) == {"rates.to_adaptive_step.bias"}


class StepAt(nn.Module):
    """A small learning rate, but `step` at one token of row 1 and head 1."""

    def __init__(self, token: int, step: float):
        super().__init__()
        self.token, self.step = token, step

    def forward(self, logits):  # [b n h]
        rate = logits.sigmoid() * 0.01
        if logits.shape[1] > self.token:
            rate = rate.clone()
            rate[1, self.token, 1] = self.step
        return rate


@variants
@pytest.mark.parametrize("token", [0, 5, 13, 23])
def test_a_learning_rate_that_is_not_finite(engine, wrapped, token):
    memory = memory_of(engine, wrapped, adaptive_step_transform=StepAt(token, math.inf))
    report = diagnose(memory, tokens())
    assert report.found.module == "rates.step_transform"
    place = report.memory
    assert (place.what, place.chunk, place.tokens) == ("learning rate", token // 4, (token, token))
    assert (place.row, place.head) == (1, 1)


@variants
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast", "no_grad", "inference_mode"])
@pytest.mark.parametrize("token", [2, 13, 23])
def test_an_overflow(engine, wrapped, mode, token):
    """The learning rate of one token is finite, its update is not: also in the last chunk, which nothing reads."""
    memory = memory_of(engine, wrapped, adaptive_step_transform=StepAt(token, 1e38))
    memory.projections.to_values.weight.data.mul_(1e5)
    x, modes = tokens(), {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    if mode == "bfloat16":
        memory, x = memory.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"), modes.get(mode, torch.enable_grad)():
        report = diagnose(memory, x)
    place = report.memory
    assert (place.what, place.chunk, place.row, place.head) == ("gradient of the inner loss", token // 4, 1, 1)
    assert place.tokens == (token // 4 * 4, token // 4 * 4 + 3)
    assert place.parameter in memory.memory_model_parameters.names
    assert place.rate == "learning rate"
    assert (report.found.module, report.found.phase) == ("", "forward")
    said = str(report)
    assert f"the learning rate of chunk {token // 4} is 1e+38: bound adaptive_step_transform below" in said
    assert said.endswith("below 1 / batch_size = 8")


@variants
def test_an_overflow_that_comes_late_names_the_chunk_that_caused_it(engine, wrapped):
    memory = memory_of(engine, wrapped, adaptive_step_transform=StepAt(5, 1e30))
    report = diagnose(memory, tokens())
    assert report.memory.chunk >= 2  # the next mini-batch
    assert (report.memory.row, report.memory.head) == (1, 1)
    assert "the learning rate of chunk 1 is 1e+30" in report.remedy


@pytest.mark.parametrize("engine", ENGINES)
def test_other_rates_to_blame(engine):
    options = {"default_step_transform_max_lr": 0.01, "per_parameter_lr_modulation": True}
    memory = memory_of(engine, False, max_mem_layer_modulation=1e38, **options)
    memory.projections.to_values.weight.data.mul_(1e5)
    report = diagnose(memory, tokens())
    assert report.memory.rate == "modulation"
    assert "lower max_mem_layer_modulation" in str(report)
    memory = memory_of(engine, False, default_step_transform_max_lr=1e-4, init_momentum_bias=20.0)
    memory.projections.to_values.weight.data.mul_(1e25)  # the square of the error overflows
    report = diagnose(memory, tokens())
    assert (report.memory.what, report.memory.rate) == ("inner loss", "momentum")
    memory = memory_of(engine, False, default_step_transform_max_lr=1e-4, momentum=False)
    memory.projections.to_values.weight.data.mul_(1e25)
    report = diagnose(memory, tokens())
    assert (report.memory.what, report.memory.rate) == ("inner loss", None)
    assert "check the scale of its keys, values" in str(report)


def root_of_zero(prediction, target):
    return (prediction - target).square().sum(dim=-1).sqrt()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_of_ones_own(engine):
    """Its gradient at 0 is not finite: in the forward pass of the model."""
    memory = memory_of(engine, False, store_memory_loss_fn=root_of_zero)
    memory.projections.to_values.weight.data.zero_()
    memory.memory_model_parameters[-1].data.zero_()
    report = diagnose(memory, tokens())
    assert (report.memory.what, report.memory.chunk) == ("gradient of the inner loss", 0)
    assert report.found.phase == "forward"


@variants
@pytest.mark.parametrize(
    "name",
    [
        "projections.to_keys",
        "projections.to_values",
        "projections.to_queries",
        "projections.retrieve_gate",
        "rates.to_momentum",
        "rates.to_decay_factor",
        "rates.to_adaptive_step",
    ],
)
def test_a_gradient_within_a_memory(engine, wrapped, name):
    memory = memory_of(engine, wrapped)
    owner, _, own = name.rpartition(".")
    setattr(memory.get_submodule(owner), own, nn.Sequential(Breaks("input"), memory.get_submodule(name)))
    report = diagnose(nn.Sequential(nn.Linear(8, 8), memory), tokens())
    assert (report.found.module, report.found.what) == (f"1.{name}.0", "gradient of the input")
    assert report.found.phase == "backward"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_of_the_rates(engine):
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            grad = grad.clone()
            grad[1, 13, 1] = math.nan
            return grad

    memory = memory_of(engine, adaptive_step_transform=lambda logits: Steep.apply(logits.sigmoid() * 0.01))
    report = diagnose(memory, tokens())
    assert (report.found.module, report.found.phase) == ("rates", "backward")


def steep_slope(prediction, target):
    """Its second derivative at an error of 0 is not finite."""
    return (prediction - target).abs().pow(1.5).mean(dim=-1)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_of_the_write_names_the_chunk(engine):
    memory = memory_of(engine, False, store_memory_loss_fn=steep_slope, default_step_transform_max_lr=0.1)
    x = tokens()
    x[1, [5, 13]] = 0.0  # keys, values and predictions are 0, and so is the error
    report = diagnose(nn.Sequential(nn.Linear(8, 8, bias=False), memory), x)
    assert (report.found.module, report.found.phase) == ("1", "backward")
    place = report.memory
    assert place.what.startswith("gradient of the ")
    assert (place.chunk, place.row) == (3, 1)  # the backward pass meets token 13 first
    assert f"in 1 the {place.what} is not finite in chunk 3 (token" in str(report)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stream_in_pieces(engine):
    memory = memory_of(engine, adaptive_step_transform=StepAt(9, 1e38))
    memory.projections.to_values.weight.data.mul_(1e5)
    x = tokens(40)
    _, state = memory(x[:, :8])
    _, state = memory(x[:, 8:14], state=state)  # at 9 alone the step is large, of the call's own tokens
    call = {"seq": x[:, 14:], "state": state}
    report = diagnose(memory, call)
    assert (report.memory.chunk, report.memory.tokens) == (5, (20, 23))  # two tokens waited: its token 9 is 21
    states = {name: weight.clone() for name, weight in state.states[0].items()}
    states["model.weights.1"][3, 0, 0] = math.nan
    report = diagnose(memory, call | {"state": state._replace(states=(states, state.states[1]))})
    assert report.found.what == "input state.states.0.model.weights.1"
    assert report.found.phase == "before the call"
    assert "diagnose the call that returned this state" in str(report)


def test_the_largest_gain():
    memory = memory_of(default_step_transform_max_lr=0.01)
    model = nn.ModuleDict({"memory": memory})
    with watch_gains(model) as gains:
        memory(tokens())
    report = diagnose(model, lambda: memory(tokens()))
    assert report.gains == dict(gains)
    assert f"the largest gain of a memory is {gains['memory']:.2g}, in memory (at most 2" in str(report)
    report = diagnose(memory_of(default_step_transform_max_lr=10.0, qk_rmsnorm=True), tokens())
    assert "above 2: it may overshoot; lower the largest step" in str(report)


class SignRule(UpdateRule):
    def update(self, weights, surprise, slots, rates):
        return weights + 0.01 * surprise.sign(), slots


def test_a_rule_of_ones_own():
    memory = NeuralMemory(8, chunk_size=4, update_rule=SignRule())
    assert diagnose(memory, tokens()).finite
    memory.projections.to_values.weight.data.mul_(1e30)
    assert diagnose(memory, tokens()).memory.what == "inner loss"


def test_a_watcher_sees_the_events_that_it_has_methods_for():
    class Watcher:
        seen = 0

        def wrote(self, chunks, carry, window, mini_batch, transition):
            self.seen += len(chunks)

    memory, watcher = memory_of(), Watcher()
    with watched({memory.engine: watcher, memory: watcher}):
        memory(tokens())
    assert watcher.seen == 6
    memory(tokens())
    assert watcher.seen == 6


# models


def transformer() -> nn.Module:
    return MemoryAsContextTransformer(
        num_tokens=16,
        dim=8,
        depth=2,
        segment_len=4,
        heads=2,
        dim_head=4,
        num_longterm_mem_tokens=1,
        num_persist_mem_tokens=1,
        neural_memory_batch_size=10,
        neural_memory_model=MemoryMLP(4, 2),
        neural_memory_kwargs={"dim_head": 4, "heads": 2},
        neural_memory_qkv_receives_diff_views=True,
        neural_mem_weight_residual=True,
        neural_mem_gate_attn_output=False,
    )


def family(variant: str) -> nn.Module:
    sizes = {"d_model": 8, "n_layers": 1, "n_heads": 2, "mem_heads": 2, "window": 8, "chunk_size": 4}
    return build_model(ModelConfig(variant=variant, vocab_size=16, **sizes))


MODELS = {"transformer": transformer} | {name: lambda name=name: family(name) for name in ("mac", "mag", "mal", "lmm")}
IDS = torch.arange(32).view(2, 16) * 7 % 16


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_a_model(name):
    torch.manual_seed(0)
    model = randomise(MODELS[name]())
    assert diagnose(model, IDS[:, :12]).finite
    for full, p in model.named_parameters():
        owner, _, own = full.rpartition(".")
        if not p.numel():
            continue
        kept, grad = p.detach().clone(), p.requires_grad
        p.data.view(-1)[0] = math.nan
        report = diagnose(model, IDS[:, :12])
        p.data.copy_(kept)
        assert p.requires_grad == grad
        if report.finite:
            assert list(report.harmless) == [full]
            continue
        assert (report.found.module, report.found.what) == (owner, f"parameter {own}"), full
        assert report.found.index == (0,) * p.ndim
        if (memory := report.memory) is not None:
            assert full.startswith(memory.memory + ".")


class SteepLinear(nn.Linear):
    """The root of zero is added."""

    def forward(self, x):
        y = super().forward(x)
        return y + (y * 0).square().sum().sqrt()


@pytest.mark.parametrize("name", MODELS)
def test_a_gradient_in_a_model(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    linears = [n for n, m in model.named_modules() if type(m) is nn.Linear and n.startswith(("layers", "blocks"))]
    for full in linears[:: max(len(linears) // 8, 1)]:
        linear = model.get_submodule(full)
        linear.__class__ = SteepLinear
        report = diagnose(model, IDS)
        linear.__class__ = nn.Linear
        if report.finite:  # its result is not used
            continue
        assert (report.found.module, report.found.phase) == (full, "backward")


@pytest.mark.parametrize("name", MODELS)
def test_an_overflow_in_a_model(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    memories = [(n, m) for n, m in model.named_modules() if isinstance(m, NeuralMemory)]
    at, memory = memories[-1]
    memory.rates.step_transform = StepAt(6, 1e38)
    memory.projections.to_values.weight.data.mul_(1e5)
    with torch.no_grad():
        report = diagnose(model, IDS)
    assert (report.found.module, report.memory.memory) == (at, at)
    assert (report.memory.row, report.memory.head, report.memory.rate) == (1, 1, "learning rate")
    assert report.memory.chunk == 6 // memory.store_chunk_size
    assert f"of {at} (NeuralMemory)" in str(report)


@pytest.mark.parametrize("name", ["mac", "mag", "mal", "lmm"])
def test_gradient_checkpointing(name):
    torch.manual_seed(0)
    model = family(name).train()
    model.gradient_checkpointing = True
    report = diagnose(model, IDS)
    assert report.finite
    assert report.backward
    full = next(n for n, m in model.named_modules() if n.endswith("projections.to_values"))
    model.get_submodule(full).__class__ = SteepLinear
    report = diagnose(model, IDS)
    assert (report.found.module, report.found.phase) == (full, "backward")


@pytest.mark.parametrize(("step", "above"), [(100.0, True), (0.01, False)])
def test_a_gradient_that_is_not_finite_beside_steps_that_overshoot(step, above):
    torch.manual_seed(0)
    memory = NeuralMemory(8, 1, batch_size=4, qk_rmsnorm=True, default_step_transform_max_lr=step).double()
    seq = torch.randn(1, 4, 8, dtype=torch.float64)
    report = diagnose(memory, seq, loss=lambda out: out[0].mean() + (out[0] * 0.0).square().sum().sqrt())
    assert report.found.phase == "backward"
    assert report.remedy.startswith("the gain of the memory is ") == above
    assert report.remedy.endswith("look for a root, a norm or a division at 0, or for products that overflow")
