"""The decoder of the paper's models against their own calls: logits and everything that is carried."""

import copy
import pickle

import pytest
import torch
from torch import nn

from titans_pytorch import NeuralMemory
from titans_pytorch.analysis.storing import storing_off
from titans_pytorch.common.switches import watched
from titans_pytorch.decoding.sampling import cached_logits
from titans_pytorch.decoding.steps import STEPS, CacheDecoder
from titans_pytorch.models.attention import SegmentAttention, WindowAttention
from titans_pytorch.models.config import ModelConfig
from titans_pytorch.models.family import MODELS, build_model
from titans_pytorch.models.gates import GATES, Gate
from titans_pytorch.models.language_model import Block, LanguageModel
from titans_pytorch.models.memory import Remember
from titans_pytorch.models.rule_settings import RULES

from ..helpers import SMALL, assert_close, randomise
from ..mac_options import draw_ids
from ..test_decoding import both, errors

VARIANTS = ("mac", "mag", "mal", "lmm")
SETTINGS = {
    "paper": {},
    "rms": {"qk_norm": "rms", "mem_norm": True, "mem_layers": 3},
    "bare": {"qk_norm": "none", "conv_kernel": 0, "use_momentum": False, "use_decay": False, "n_persistent": 0},
    "matrix": {"mem_layers": 1, "mem_heads": 1},
    "threshold": {"surprise_threshold": 0.8},
    "prediction": {"surprise_threshold": 0.9, "surprise_source": "prediction"},
    "short": {"chunk_size": 1, "window": 1},
    "mini-batch": {"chunk_size": 64},
    **{f"gate {gate}": {"gate": gate} for gate in GATES[1:]},
}
MEMORIES = {
    "exact": {},
    "exact with momentum": {"momentum": True, "batch_size": 3},
    "shared heads": {"per_head_learned_parameters": False},
    # not by a step
    "chunk": {"chunk_size": 2, "batch_size": 2},
    "orders": {"momentum": True, "momentum_order": 2},
    "modulation": {"per_parameter_lr_modulation": True},
    "clamp": {"max_grad_norm": 0.1},
    "pages": {"use_symplectic_gating": True, "num_pages": 2, "page_switch_every": 4, "symplectic_page_threshold": 0.1},
    "transition": {"batch_size": 2, "gated_transition": True},
    "pairs": {"num_kv_per_token": 2},
    "sequential": {"engine": "sequential"},
}
OWN = (NeuralMemory, SegmentAttention, WindowAttention, Gate, Remember, Block)


def small(variant, **settings):
    torch.manual_seed(0)
    options = SMALL | {"variant": variant, "chunk_size": 3, "max_step": 0.3} | settings
    return randomise(build_model(ModelConfig(**options)).double(), scale=0.2).eval()


def with_memory(variant, **options):
    model = small(variant)
    for block in model.blocks:
        memory = NeuralMemory.exact(8, heads=2, dim_head=4, qkv_conv_kernel=2, **options)
        block.layer.remember.memory = randomise(memory.double(), scale=0.2)
    return model


def check(model, prompt, n=14, limit=1e-9):
    (logits, cache), (wanted, own) = both(model, prompt, n)
    assert_close(logits, wanted, limit)
    assert max(errors(cache, own)) <= limit
    assert cache.tokens == prompt.shape[1] + n


@pytest.fixture
def calls(monkeypatch):
    """The modules that decoders call in place of a step."""
    called = []
    for kind in OWN:
        forward = kind.forward
        note = lambda self, *args, own=forward, **kwargs: (called.append(type(self)), own(self, *args, **kwargs))[1]  # noqa: E731
        monkeypatch.setattr(kind, "forward", note)
    return called


def steps_of(model, ids, n=6):
    """Return the decoder's logits of the last n tokens."""
    with torch.no_grad():
        decoder = model.decoder(model(ids[:, :-n], return_cache=True)[1])
        return torch.stack([decoder.step(token[:, None]) for token in ids[:, -n:].unbind(1)], dim=1)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_numbers_are_the_models(variant, name):
    """From the middle of a segment and of a mini-batch, and from their ends, in two rows."""
    for prompt in (5, 12):
        check(small(variant, **SETTINGS[name]), draw_ids(2, prompt))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule(rule):
    torch.manual_seed(0)
    model = randomise(build_model(ModelConfig(variant="lmm", rule=rule, **SMALL)).double(), scale=0.1).eval()
    check(model, draw_ids(2, 5), 7)


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("variant", ["mac", "mal"])
def test_any_memory(variant, name):
    check(with_memory(variant, **MEMORIES[name]), draw_ids(2, 5))


@pytest.mark.parametrize("batch", [1, 5])
def test_the_plain_transformer_and_any_batch(batch):
    for variant in MODELS:
        check(small(variant), draw_ids(batch, 5), 5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_is_as_good_as_the_models(variant):
    model, ids = small(variant), draw_ids(1, 40)
    with torch.no_grad():
        wanted, model = model(ids)[:, 10:], model.float()
        error, own = ((x.double() - wanted).abs().max() for x in (steps_of(model, ids, 30), model(ids)[:, 10:]))
    assert error < 3 * own + 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_called_where_a_step_applies(variant, calls):
    for model in (small(variant), with_memory(variant)):
        with torch.no_grad():
            decoder = model.decoder(model(draw_ids(2, 5), return_cache=True)[1])
            calls.clear()
            for token in draw_ids(2, 9).unbind(1):
                decoder.step(token[:, None])
        assert calls == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_states_are_new_and_parameters_read_at_every_step(variant):
    model, ids = small(variant), draw_ids(2, 12)
    with torch.no_grad():
        _, cache = model(ids, return_cache=True)
        kept = pickle.loads(pickle.dumps(cache))
        one, other = (model.decoder(cache) for _ in range(2))
        first = one.step(ids[:, :1])
        assert max(errors(cache, kept)) == 0
        assert first.equal(other.step(ids[:, :1]))
        later = copy.deepcopy(one.cache()).rows(torch.tensor([1, 1, 0]))
        assert_close(model.decoder(later).step(ids[[1, 1, 0], 1:2])[2:], one.step(ids[:, 1:2])[:1])
        randomise(model, 3, 0.2)
        assert_close(other.step(ids[:, 1:2]), model(ids[:, 1:2], cache=later.rows(torch.tensor([2, 0])))[:, 0])


def modules_of(model):
    """A module of each type, by its name."""
    return {type(module): name for name, module in model.named_modules()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_hooks_and_replaced_forwards_are_called(variant):
    ids = draw_ids(1, 9)
    kinds = {
        kind: name for kind, name in modules_of(small(variant)).items() if kind not in (nn.ModuleList, nn.Identity)
    }
    called = []
    for kind, name in kinds.items():
        for way in ("hook", "pre hook", "instance"):
            model = small(variant)
            module = model.get_submodule(name)
            with torch.no_grad():
                decoder = model.decoder(model(ids, return_cache=True)[1])
            seen = []
            if way == "hook":
                module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
            elif way == "pre hook":
                module.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
            else:
                forward = module.forward
                module.forward = lambda *args, own=forward, seen=seen, **kwargs: (seen.append(1), own(*args, **kwargs))[
                    1
                ]
            with torch.no_grad():
                own = model(ids[:, :1], cache=decoder.cache())
                wanted, seen[:] = len(seen), []
                assert_close(decoder.step(ids[:, :1]), own[:, 0])
            assert len(seen) == wanted, (kind.__name__, way)
            called.append(wanted)
    assert sum(map(bool, called)) > 30


def test_switches_and_watchers_are_minded(calls):
    model, ids = small("mag"), draw_ids(1, 9)
    memory = model.blocks[0].layer.remember.memory
    wanted = model(ids)
    with torch.no_grad():
        _, cache = model(ids[:, :6], return_cache=True)
        with storing_off(model):
            still = model(ids[:, 6:7], cache=cache)[:, 0]
            assert_close(model.decoder(cache).step(ids[:, 6:7]), still)
        assert (model.decoder(cache).step(ids[:, 6:7]) - still).abs().max() > 1e-6

    class Watcher:
        told = 0

        def stored(self, state, surprises):
            self.told += 1

    with watched({memory: (watcher := Watcher())}), torch.no_grad():
        model.decoder(cache).step(ids[:, 6:7])
    assert watcher.told == 1
    decoder = model.decoder(cache)
    for n in (6, 7):
        logits = decoder.step(ids[:, n : n + 1])
        assert logits.requires_grad
        assert_close(logits, wanted[:, n])
    with torch.autocast("cpu"), torch.no_grad():
        calls.clear()
        model.float()
        model.decoder(model(ids, return_cache=True)[1]).step(ids[:, :1])
        assert NeuralMemory in calls


class Halved(nn.Module):
    """A user's layer with a state of its own."""

    def forward(self, x, state=None, return_surprises=False):
        total = x.cumsum(dim=1) + (0.0 if state is None else state)
        return total / 2, total[:, -1:], ()


class Scaled(LanguageModel):
    def new_layer(self, config):
        return Halved()


class Doubled(Scaled):
    def forward(self, *args, **kwargs):
        logits, cache = super().forward(*args, **kwargs | {"return_cache": True})
        return (2 * logits, cache) if kwargs.get("return_cache") else 2 * logits


@pytest.mark.parametrize("kind", [Scaled, Doubled])
def test_a_model_and_layers_of_ones_own(kind):
    torch.manual_seed(0)
    model = kind(ModelConfig(**SMALL)).double().eval()
    check(model, draw_ids(2, 5))


def test_a_step_of_ones_own(monkeypatch):
    torch.manual_seed(0)
    model, ids = Scaled(ModelConfig(**SMALL)).double().eval(), draw_ids(2, 9)
    steps = []

    def halved_step(layer, x, state, return_surprises):
        steps.append(x)
        return (x + state) / 2, x + state, ()

    monkeypatch.setitem(STEPS, Halved, halved_step)
    assert_close(steps_of(model, ids), model(ids)[:, -6:])
    assert len(steps) == 12


def test_any_model_samples_by_its_calls():
    """Also one whose submodule is named `decoder`."""

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Linear(1, 7)

        def forward(self, ids, cache=None, return_cache=False):
            total = ids.cumsum(dim=1)[..., None].double() + (0.0 if cache is None else cache)
            return self.decoder(total.float()), total[:, -1:]

    model, ids = Other(), draw_ids(2, 6)
    read = cached_logits(model)
    for n in (3, 4, 5):
        assert_close(read(ids[:, :n]), model(ids[:, :n])[0][:, -1], 1e-6)


def test_a_decoder_checks_its_cache():
    model = small("mag")
    cache = model(draw_ids(2, 5), return_cache=True)[1]
    assert type(model.decoder(cache)) is CacheDecoder
    with pytest.raises(ValueError, match="cache"):
        small("mag", window=5).decoder(cache)
    with pytest.raises(ValueError, match="cache must be one of 3, as the ids"):
        model.decoder(cache).step(draw_ids(3, 1))
    with pytest.raises(ValueError, match="ids must be"):
        model.decoder(cache).step(draw_ids(2, 1) + 11)
