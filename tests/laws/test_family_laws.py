"""The laws of the family's language models, each over every variant with random options and randomised parameters.

A longer search: HYPOTHESIS_EXAMPLES=500 python -m pytest tests/laws/test_family_laws.py
"""

import dataclasses
import io
import os
from collections.abc import Mapping

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from titans_pytorch import ModelConfig, build_model
from titans_pytorch.models.config import VARIANTS
from titans_pytorch.models.rule_settings import RULES, unfit

from ..helpers import assert_close, assert_same_gradients, gradients, randomise

lawful = settings(
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "6")),
    deadline=None,
    derandomize="HYPOTHESIS_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)
WITH_MEMORY = [variant for variant in VARIANTS if variant != "baseline"]
TOKENS = 11  # of the vocabulary

# the first value is the plain one, towards which failing examples shrink
AXES = {
    "rule": ["titans", *RULES],
    "n_layers": [1, 2],
    "n_heads": [1, 2],
    "mem_heads": [1, 2, 4],
    "ffn_mult": [2.0],
    "n_persistent": [0, 1, 3],
    "window": [4, 1, 2, 3, 7],
    "mem_layers": [1, 2, 3],
    "d_hidden": [None, 3],
    "chunk_size": [4, 1, 2, 3, 5],
    "use_momentum": [True, False],
    "use_decay": [True, False],
    "max_step": [0.1, 0.5],
    "conv_kernel": [0, 2, 4],
    "surprise_threshold": [None, 0.3],
    "surprise_source": ["memory", "prediction"],
    "qk_norm": ["l2", "rms", "none"],
    "gate": ["normalised", "silu", "sigmoid", "convex"],
    "mem_init_scale": [1.0, 0.5],
    "mem_norm": [False, True],
    "init_step_bias": [None, 1.0],
    "init_decay_bias": [-6.0, -2.0, None],
    "tie_embeddings": [False, True],
}


def fitting(options):
    """The options, those that the rule has no place for at their defaults."""
    model = ModelConfig(**{name: value for name, value in options.items() if name != "rule"} | {"d_model": 8})
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    return options | {name: defaults[name] for name, _ in unfit(options["rule"], model)}


option_sets = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in AXES.items()}).map(fitting)
every_variant = pytest.mark.parametrize("variant", VARIANTS)
with_memory = pytest.mark.parametrize("variant", WITH_MEMORY)


def model_of(variant, options, seed=0):
    torch.manual_seed(seed)
    model = build_model(ModelConfig(variant=variant, vocab_size=TOKENS, d_model=8, **options)).double()
    return randomise(model, seed, 0.2)


def rounding(options):
    """How much more rounding matters: Newton-Schulz iterations of nearly equal updates amplify it."""
    return 1e3 if options["rule"] in ("atlas", "lact") else 1.0


def ids_of(n, batch=2, seed=3):
    return torch.randint(0, TOKENS, (batch, n), generator=torch.Generator().manual_seed(seed))


def in_pieces(model, ids, cuts):
    cache, outs = None, []
    edges = [0, *cuts, ids.shape[1]]
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        out, cache = model(ids[:, start:stop], cache=cache, return_cache=True)
        outs.append(out)
    return torch.cat(outs, dim=1), cache


def tensors_of(state):
    """Every tensor of a state, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, Mapping):
        return [tensor for name in sorted(state.keys()) for tensor in tensors_of(state[name])]
    return [tensor for part in state for tensor in tensors_of(part)] if isinstance(state, tuple) else []


@every_variant
@lawful
@given(options=option_sets, n=st.integers(2, 18), data=st.data())
def test_causal(variant, options, n, data):
    model, ids = model_of(variant, options), ids_of(n)
    t = data.draw(st.integers(0, n - 2), label="t")
    other = ids.clone()
    other[:, t + 1 :] = (ids[:, t + 1 :] + 1 + ids_of(n, seed=5)[:, t + 1 :] % (TOKENS - 1)) % TOKENS
    with torch.no_grad():
        before, after = model(ids), model(other)
    assert_close(after[:, : t + 1], before[:, : t + 1], 1e-12 * rounding(options))
    assert (after[:, t + 1 :] != before[:, t + 1 :]).any()


@every_variant
@lawful
@given(options=option_sets, n=st.integers(1, 18), data=st.data())
def test_split_invariant(variant, options, n, data):
    """Any way of cutting a sequence into calls, the state of each passed on, and saved and read in between."""
    model, ids = model_of(variant, options), ids_of(n)
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1)) if n > 1 else st.just(set()), label="cuts"))
    with torch.no_grad():
        whole, cache = model(ids, return_cache=True)
        parts, parts_cache = in_pieces(model, ids, cuts)
        assert_close(parts, whole, 1e-9 * rounding(options), "logits")
        assert cache.tokens == parts_cache.tokens == n
        for got, wanted in zip(tensors_of(parts_cache), tensors_of(cache), strict=True):
            assert_close(got, wanted, 1e-9 * rounding(options), "state")
        file = io.BytesIO()
        torch.save(parts_cache, file)
        file.seek(0)
        more = ids_of(3, seed=8)
        again = model(more, cache=torch.load(file), return_cache=True)[0]
        assert_close(
            again, model(torch.cat((ids, more), dim=1))[:, n:], 1e-9 * rounding(options), "after a saved state"
        )


@every_variant
@lawful
@given(options=option_sets, n=st.integers(2, 12))
def test_token_by_token_with_gradients(variant, options, n):
    model, ids = model_of(variant, options), ids_of(n)
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
    whole, parts = model(ids), in_pieces(model, ids, range(1, n))[0]
    assert_close(parts, whole, 1e-9 * rounding(options))
    assert_same_gradients(gradients([parts], leaves), gradients([whole], leaves), 1e-8 * rounding(options))


@every_variant
@lawful
@given(options=option_sets, n=st.integers(1, 9))
def test_cached_sampling_is_uncached_sampling(variant, options, n):
    model, prompt = model_of(variant, options), ids_of(n)
    drawn = []
    for use_cache in (False, True):
        torch.manual_seed(4)
        drawn.append(model.sample(prompt, n + 6, use_cache=use_cache))
    assert drawn[0].shape == (2, 6)
    assert drawn[0].equal(drawn[1])


@every_variant
@lawful
@given(options=option_sets, n=st.integers(1, 14))
def test_rows_are_independent(variant, options, n):
    """A row alone, beside another, or taken out of a state gives the same."""
    model, ids = model_of(variant, options), ids_of(n, batch=3)
    more, order = ids_of(4, batch=3, seed=6), torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        out, cache = model(ids, return_cache=True)
        for row in range(3):
            assert_close(model(ids[row : row + 1]), out[row : row + 1], 1e-11 * rounding(options))
        picked = model(more[order], cache=cache.rows(order), return_cache=True)[0]
        wanted = model(more, cache=cache, return_cache=True)[0][order]
        assert_close(picked, wanted, 1e-11 * rounding(options), "rows of a state")


@with_memory
@lawful
@given(options=option_sets)
def test_the_state_does_not_grow(variant, options):
    """What a token costs does not depend on what came before: the state has the same tensors, of the same sizes."""
    takes = RULES.get(options["rule"])
    chunk = 1 if takes and takes.chunk is None else options["chunk_size"]
    model, period = model_of(variant, options), options["window"] * chunk
    sizes, cache = [], None
    with torch.no_grad():
        for seed in range(4):
            _, cache = model(ids_of(2 * period, seed=seed), cache=cache, return_cache=True)
            sizes.append(
                [(t.shape, t.untyped_storage().nbytes()) for t in tensors_of(cache)]
            )  # a view keeps all it is taken from
    assert sizes[1] == sizes[2] == sizes[3]


@with_memory
@lawful
@given(options=option_sets)
def test_surprises_of_pieces_are_those_of_the_whole(variant, options):
    model, ids = model_of(variant, options), ids_of(13)
    with torch.no_grad():
        _, whole = model(ids, return_surprises=True)
        _, cache, first = model(ids[:, :6], return_cache=True, return_surprises=True)
        _, _, second = model(ids[:, 6:], cache=cache, return_cache=True, return_surprises=True)
    assert len(whole) == options["n_layers"]
    for pair in zip(whole, first, second, strict=True):
        assert len(pair[0]) == (3 if options["surprise_source"] == "prediction" else 2)
        for all_of_it, a, b in zip(*pair, strict=True):
            if options["rule"] != "lact":  # whose surprises are those of complete chunks
                assert all_of_it.shape in ((2, options["mem_heads"], 13), (2, 13))
            assert_close(torch.cat((a, b), dim=-1), all_of_it, 1e-9 * rounding(options))


@every_variant
def test_finite_over_16384_tokens(variant):
    """In float32, in pieces of 4096, with the defaults of a configuration."""
    torch.manual_seed(0)
    config = ModelConfig(variant=variant, d_model=16, n_layers=1, n_heads=2, mem_heads=2, window=64)
    model, cache = build_model(config), None
    text = torch.randint(0, 256, (1, 512)).repeat(1, 32)  # it repeats itself: the memory gets to know it
    text[:, 8192:10240] = 7
    with torch.no_grad():
        for piece in text.split(4096 if variant != "baseline" else 16384, dim=1):
            logits, cache = model(piece, cache=cache, return_cache=True)
            assert logits.isfinite().all()
    assert cache.tokens == 16384
    assert all(tensor.isfinite().all() for tensor in tensors_of(cache))


@with_memory
def test_rounding_does_not_grow(variant):
    """With the defaults a long stream in float32 is the same however it is cut, to rounding."""
    torch.manual_seed(0)
    config = ModelConfig(variant=variant, d_model=64, n_layers=2, n_heads=2, mem_heads=2, window=32, chunk_size=16)
    model, text = build_model(config), torch.randint(0, 256, (1, 1000)).repeat(1, 2)
    with torch.no_grad():
        assert_close(in_pieces(model, text, range(90, 2000, 300))[0], model(text), 1e-4)
