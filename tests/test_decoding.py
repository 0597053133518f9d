"""The decoder against the model's own calls: logits and everything that is carried."""

import copy
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from titans_pytorch.decoding.connection import FewTokens
from titans_pytorch.decoding.decoder import FEW, Decoder
from titans_pytorch.decoding.memory import AnyMemoryStep, MemoryStep
from titans_pytorch.decoding.steps import CacheDecoder
from titans_pytorch.mac_transformer import MemoryAsContextTransformer
from titans_pytorch.neural_memory import NeuralMemory

from .helpers import assert_close, relative_error
from .laws.rounding import SLACK, shaken
from .mac_options import OPTIONS, build, draw_ids

MEMORIES = {
    "plain": {},
    "orders": {"momentum_order": 2, "learned_momentum_combine": True, "max_grad_norm": 0.5, "gated_transition": True},
    "lookahead": {"store_with_lookahead_value": True, "num_kv_per_token": 2, "post_rmsnorm": True},
    "paper": {"qkv_conv_kernel": 3, "qk_rmsnorm": False, "qk_l2norm": True, "output_gate": "silu"},
    "threshold": {"surprise_threshold": 0.9, "surprise_source": "prediction"},
    "reference": {"engine": "reference"},
}


def errors(got, wanted) -> list[float]:
    """Relative, of each tensor that is carried; everything else is the same."""
    if isinstance(wanted, torch.Tensor):
        return [relative_error(got, wanted)]
    if isinstance(wanted, tuple):
        return [e for one, other in zip(got, wanted, strict=True) for e in errors(one, other)]
    if isinstance(wanted, Mapping):
        assert list(got) == list(wanted)
        return [e for name in wanted for e in errors(got[name], wanted[name])]
    assert got == wanted
    return []


def both(model, prompt, n, seed=0):
    """The decoder's logits and cache after n tokens, and the model's own."""
    ids = draw_ids(prompt.shape[0], n, seed + 1)
    with torch.no_grad():
        _, cache = model(prompt, return_cache=True)
        decoder, got, wanted = model.decoder(cache), [], []
        for token in ids.unbind(1):
            got.append(decoder.step(token[:, None]))
            logits, cache = model(token[:, None], cache=cache, return_cache=True)
            wanted.append(logits[:, 0])
    return (torch.stack(got), decoder.cache()), (torch.stack(wanted), cache)


def check(model, prompt, n, seed=0, limit=1e-9):
    got, wanted = both(model, prompt, n, seed)
    found = errors(got, wanted)
    if not all(error <= limit for error in found):  # only then is it worth while to see how much rounding can do
        shaken_model, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in shaken_model.parameters():
                p.copy_(shaken(p, generator))
        limit = SLACK * max(errors(both(shaken_model, prompt, n, seed)[1], wanted))
    assert all(error <= limit for error in found), f"relative errors {found}, allowed {limit:.0e}"


@settings(max_examples=25, deadline=None)
@given(OPTIONS, st.integers(1, FEW), st.integers(1, 25), st.integers(0, 99))
def test_numbers_are_the_models(options, batch, prompt_len, seed):
    model = build(options, seed).eval()
    check(model, draw_ids(batch, prompt_len, seed), 13, seed)


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("sliding", [False, True])
def test_any_memory(name, sliding):
    kwargs = {"qk_rmsnorm": True, "default_step_transform_max_lr": 0.1, "dim_head": 5, "heads": 2, **MEMORIES[name]}
    options = {"depth": 2, "segment_len": 4, "num_longterm_mem_tokens": 1, "neural_memory_segment_len": 3, "batches": 2}
    model = build({**options, "sliding_window_attn": sliding, "neural_memory_kwargs": kwargs}).eval()
    with torch.no_grad():
        decoder = model.decoder(model(draw_ids(1, 2), return_cache=True)[1])
    direct = name not in ("paper", "reference")
    assert all(isinstance(x.memory, MemoryStep if direct else AnyMemoryStep) for x in decoder.layers)
    assert all(isinstance(x.feed_forward_connection, FewTokens) for x in decoder.layers)
    check(model, draw_ids(2, 6), 17)


def test_a_prompt_of_any_length_and_its_cache_again():
    """A decoder begins where another ends, and where the model's own calls do."""
    model = build({"depth": 2, "segment_len": 5, "num_longterm_mem_tokens": 2, "neural_memory_segment_len": 3}).eval()
    ids = draw_ids(1, 40)
    with torch.no_grad():
        wanted = model(ids)
        for n in (1, 5, 11, 20):
            _, cache = model(ids[:, :n], return_cache=True)
            for end in (n + 4, n + 9):
                decoder = model.decoder(cache)
                for t in range(cache.tokens, end):
                    assert_close(decoder.step(ids[:, t : t + 1]), wanted[:, t], 1e-9)
                cache = decoder.cache()


def test_float32_is_as_good_as_the_models():
    model = build({"depth": 2, "segment_len": 8, "num_longterm_mem_tokens": 1}).eval()
    with torch.no_grad():
        wanted = model(draw_ids(1, 60))[:, 6:]
        model.float()
        _, cache = model(draw_ids(1, 60)[:, :6], return_cache=True)
        decoder = model.decoder(cache)
        got = torch.stack([decoder.step(token[:, None]) for token in draw_ids(1, 60)[:, 6:].unbind(1)], dim=1)
        error, own = ((x.double() - wanted).abs().max() for x in (got, model(draw_ids(1, 60))[:, 6:]))
    assert error < 3 * own + 1e-6


class Other(NeuralMemory):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_when_there_is_none():
    model = build({"depth": 2, "segment_len": 4}).eval()

    def decoder(batch=1):
        with torch.no_grad():
            return model.decoder(model(draw_ids(batch, 3), return_cache=True)[1])

    def assert_by_calls(batch=1):
        assert type(decoder(batch)) is CacheDecoder

    assert type(decoder()) is Decoder
    assert_by_calls(FEW + 1)
    model.train()
    assert_by_calls()
    model.eval()
    for module in (model, model.layers[1], model.layers[1].attention, model.layers[0].memory):
        hook = module.register_forward_hook(lambda *_: None)
        assert_by_calls()
        hook.remove()
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert_by_calls()
    model.layers[0].memory.__class__ = Other
    assert_by_calls()
    model.layers[0].memory.__class__ = NeuralMemory
    with torch.autocast("cpu"):
        assert_by_calls()
    assert type(decoder()) is Decoder
    model.bfloat16()
    assert_by_calls()


def test_asked_once_and_not_where_a_connection_is_listened_to():
    model = MemoryAsContextTransformer(num_tokens=16, dim=8, depth=1, segment_len=4, dim_head=4, heads=2).eval()
    ids = torch.randint(0, 16, (1, 3))
    with torch.no_grad():
        _, cache = model(ids, return_cache=True)
        assert type(model.decoder(cache)) is Decoder
        handle = model.layers[0].attention_connection.register_forward_hook(lambda *args: None)
        assert type(model.decoder(cache)) is CacheDecoder
        asked = []
        model.decoder = asked.append
        model.sample(ids, 7, show_progress=False, use_cache=True)
    handle.remove()
    assert len(asked) == 1
