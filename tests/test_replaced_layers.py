"""Linear maps that were quantised, adapted, pruned or re-parametrised: the models call what stands there.

Each kind of replacement is compared with a copy whose plain weights are what the replacement computes with.
"""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from titans_pytorch import MemoryAsContextTransformer, NeuralMemory
from titans_pytorch.decoding.sampling import cached_logits
from titans_pytorch.models.config import ModelConfig
from titans_pytorch.models.family import build_model
from titans_pytorch.training.config import TrainConfig
from titans_pytorch.training.optim import build_optimizer

from .helpers import SMALL, assert_close, randomise
from .laws.subjects import Subject
from .laws.test_memory_modes import PLAIN, VARIANTS

pytestmark = pytest.mark.filterwarnings("ignore")


class Adapter(nn.Module):
    """As adapters wrap a layer: base_layer and a product of two small matrices, without a weight of its own."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base
        generator = torch.Generator().manual_seed(0)
        shapes = (1, base.in_features), (base.out_features, 1)
        self.down, self.up = (
            nn.Parameter(torch.randn(shape, generator=generator).to(base.weight) * 0.3) for shape in shapes
        )

    def forward(self, x):
        return self.base_layer(x) + x @ self.down.T @ self.up.T


class Int8(torch.Tensor):
    """A weight that looks like a floating point tensor and is none inside."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight):
        self.scale = weight.abs().amax() / 127
        self.codes = (weight / self.scale).round().to(torch.int8)

    def plain(self):
        return self.codes * self.scale

    def __repr__(self):
        return "Int8"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            return nn.functional.linear(args[0], args[1].plain(), *args[2:], **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].plain())
        raise NotImplementedError(f"{function} of Int8")


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2.0 + 0.1


def linear_maps(model):
    return [(m, name, child) for m in model.modules() for name, child in m.named_children() if type(child) is nn.Linear]


def adapted(model):
    for parent, name, linear in linear_maps(model):
        setattr(parent, name, Adapter(linear))


def in_int8(model):
    for _, _, linear in linear_maps(model):
        linear.weight = nn.Parameter(Int8(linear.weight.detach()), requires_grad=False)


def parametrized(model):
    for _, _, linear in linear_maps(model):
        parametrize.register_parametrization(linear, "weight", Doubled())


def weight_normed(model):
    for _, _, linear in linear_maps(model):
        parametrizations.weight_norm(linear)


def weight_normed_by_hooks(model):
    for _, _, linear in linear_maps(model):
        nn.utils.weight_norm(linear)


def spectral_normed(model):
    for _, _, linear in linear_maps(model):
        parametrizations.spectral_norm(linear)


def pruned(model):
    for _, _, linear in linear_maps(model):
        prune.l1_unstructured(linear, "weight", amount=0.4)


def patched(model):
    """As a dispatcher replaces `forward` on the instance."""
    for _, _, linear in linear_maps(model):
        linear.forward = lambda x, own=linear: nn.Linear.forward(own, x) * 0.5


def observed(model):
    model.qconfig = torch.ao.quantization.default_qconfig
    torch.ao.quantization.prepare(model, inplace=True)


REPLACED = [
    *(adapted, in_int8, parametrized, weight_normed, weight_normed_by_hooks, spectral_normed, pruned, patched),
    observed,
]


def weights_of(linear: nn.Module) -> torch.Tensor:
    """What a replaced map multiplies by, [out in], found by calling it."""
    bias = linear(torch.zeros(1, width_of(linear), dtype=torch.float64))
    return (linear(torch.eye(width_of(linear), dtype=torch.float64)) - bias).T.detach(), bias[0].detach()


def width_of(linear):
    return linear.base_layer.in_features if isinstance(linear, Adapter) else linear.in_features


def pair(model, replace):
    """(the model with replaced layers, a plain one of the same numbers), in eval mode."""
    plain = copy.deepcopy(model).eval()
    names = [name for name, m in plain.named_modules() if type(m) is nn.Linear]
    replace(model)
    model.eval()
    with torch.no_grad():
        for name in names:
            weight, bias = weights_of(model.get_submodule(name))
            target = plain.get_submodule(name)
            target.weight.copy_(weight)
            if target.bias is not None:
                target.bias.copy_(bias)
    return model, plain


MEMORIES = {name: VARIANTS[name] for name in ("mlp model", "residual", "views", "pages", "paper")}


@pytest.mark.parametrize("replace", REPLACED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("variant", MEMORIES)
def test_a_memory(variant, replace):
    subject = Subject({**PLAIN, **MEMORIES[variant]})
    seq = subject.sequence(2, 9)
    subject.memory, plain = pair(subject.memory, replace)
    got, _, _ = subject.pieces(seq, [4])
    subject.memory = plain
    assert_close(got, subject.pieces(seq, [4])[0])


def transformer(**more):
    torch.manual_seed(0)
    options = {"depth": 2, "segment_len": 4, "num_longterm_mem_tokens": 1, "num_persist_mem_tokens": 1, "heads": 2}
    options |= {"neural_memory_segment_len": 2, "neural_mem_weight_residual": True, "dim_head": 4, **more}
    return randomise(MemoryAsContextTransformer(num_tokens=11, dim=8, **options).double())


def of_family(variant):
    return randomise(build_model(ModelConfig(variant=variant, chunk_size=4, **SMALL)).double())


MODELS = {
    "transformer": transformer,
    "views": partial(transformer, neural_memory_qkv_receives_diff_views=True, neural_mem_gate_attn_output=True),
    "mac": lambda: of_family("mac"),
    "mag": lambda: of_family("mag"),
    "mal": lambda: of_family("mal"),
    "lmm": lambda: of_family("lmm"),
}


def agrees_when_cached(model, wanted, ids, tolerance):
    """As `sample` reads: a prompt, then one token after the other."""
    with torch.no_grad():
        read = cached_logits(model)
        for n in range(3, ids.shape[1] + 1):
            assert_close(read(ids[:, :n]), wanted[:, n - 1], tolerance)


@pytest.mark.parametrize("replace", REPLACED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_and_its_cached_sampling(name, replace):
    model, plain = pair(MODELS[name](), replace)
    ids = torch.randint(0, 11, (1, 14), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = plain(ids)
        assert_close(model(ids), wanted, 1e-8)
    agrees_when_cached(model, wanted, ids, 1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_dynamic_quantisation(name):
    """Activations are rounded by what else a call reads: sampling is compared with calls of one token, without
    long-term tokens, which a call reads together with the next token."""
    model = MODELS[name](**{"num_longterm_mem_tokens": 0} if name in ("transformer", "views") else {}).float().eval()
    ids = torch.randint(0, 11, (1, 14), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(ids)
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        quantised = model(ids)
    assert not torch.equal(quantised, plain)
    assert_close(quantised, plain, 0.25)
    read, cache = cached_logits(model), None
    with torch.no_grad():
        for n in range(3, 15):
            wanted, cache = model(ids[:, 0 if n == 3 else n - 1 : n], cache=cache, return_cache=True)
            assert_close(read(ids[:, :n]), wanted[:, -1], 1e-4)


def test_dynamic_quantisation_of_a_memory():
    memory = randomise(
        NeuralMemory(16, chunk_size=4, heads=2, dim_head=8, qkv_conv_kernel=3, output_gate="silu")
    ).eval()
    seq = torch.randn(2, 16, 16)
    with torch.no_grad():
        plain, _ = memory(seq)
        quantised = torch.ao.quantization.quantize_dynamic(memory, {nn.Linear})
        got, state = quantised(seq[:, :6])
        got = torch.cat((got, quantised(seq[:, 6:], state=state)[0]), dim=1)
    assert_close(got, plain, 0.1)


def test_the_dtype_of_plain_maps_is_still_checked():
    memory = NeuralMemory(4, chunk_size=2)
    with pytest.raises(ValueError, match="seq must be torch.float32"):
        memory(torch.randn(1, 4, 4, dtype=torch.float64))


def test_a_decoder_keeps_out_of_wrapped_layers():
    """A forward on the instance, or a module around a layer, is heard in cached sampling too."""

    class Around(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, *args, **kwargs):
            streams, *rest = self.layer(*args, **kwargs)
            return streams * 0.5, *rest

    ids = torch.randint(0, 11, (1, 9), generator=torch.Generator().manual_seed(1))
    for wrap in ("around", "instance", "norm"):
        model = transformer().eval()
        if wrap == "around":
            model.layers[0] = Around(model.layers[0])
        else:
            module = (
                model.layers[0].attention if wrap == "instance" else model.layers[0].memory.projections.retrieve_norm
            )
            own = module.forward

            def halved(*args, own=own, **kwargs):
                out = own(*args, **kwargs)
                return (out[0] * 0.5, *out[1:]) if isinstance(out, tuple) else out * 0.5

            module.forward = halved
        with torch.no_grad():
            agrees_when_cached(model, model(ids), ids, 1e-9)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizer_knows_what_a_weight_is_computed_from(optimizer):
    model = nn.Sequential(nn.Linear(16, 16), parametrizations.orthogonal(nn.Linear(16, 16)))
    parametrize.register_parametrization(model[0], "weight", Doubled())
    groups = build_optimizer(model, TrainConfig(optimizer=optimizer, weight_decay=0.1)).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.ndim == 2}
