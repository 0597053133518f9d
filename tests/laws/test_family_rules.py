"""The laws of the family's language models for each update rule by name (test_family_laws.py draws the rest)."""

import io

import pytest
import torch

from titans_pytorch.models.rule_settings import RULES

from ..helpers import assert_close, assert_same_gradients, gradients
from .test_family_laws import WITH_MEMORY, ids_of, in_pieces, model_of, tensors_of

N = 13
SMALL = {"n_layers": 1, "n_heads": 2, "mem_heads": 2, "ffn_mult": 1.0, "n_persistent": 2, "window": 5}
each = pytest.mark.parametrize(("variant", "rule"), [(v, rule) for v in WITH_MEMORY for rule in RULES])


def ruled(variant, rule):
    chunk = {} if RULES[rule].chunk is None else {"chunk_size": 3}
    return model_of(variant, SMALL | {"rule": rule} | chunk)


@each
def test_causal_and_split_invariant_with_gradients(variant, rule):
    """Down to single tokens, the state saved and read in between; what the state carries is the same."""
    model, ids = ruled(variant, rule), ids_of(N)
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
    whole, cache = model(ids, return_cache=True)
    wanted = gradients([whole], leaves)
    for cuts in ([4], range(1, N)):
        parts, after = in_pieces(model, ids, cuts)
        assert_close(parts, whole, 1e-9)
        assert_same_gradients(gradients([parts], leaves), wanted)
        for got, one in zip(tensors_of(after), tensors_of(cache), strict=True):
            assert_close(got, one, 1e-9, "state")
    file, more = io.BytesIO(), ids_of(3, seed=8)
    torch.save(after.detach(), file)
    file.seek(0)
    with torch.no_grad():
        both = model(torch.cat((ids, more), dim=1))
        assert_close(model(more, cache=torch.load(file), return_cache=True)[0], both[:, N:], 1e-9, "a saved state")
        assert_close(both[:, :N], whole, 1e-9, "later tokens")
        assert (model(ids.roll(1, 1))[:, -1] != whole[:, -1]).any()


@each
def test_steps_of_one_token(variant, rule):
    """What `sample` and `generate` run gives the logits of the whole sequence, and its state."""
    model, ids = ruled(variant, rule), ids_of(N)
    with torch.no_grad():
        whole, after = model(ids, return_cache=True)
        decoder = model.decoder(model(ids[:, :2], return_cache=True)[1])
        for t in range(2, N):
            assert_close(decoder.step(ids[:, t : t + 1]), whole[:, t], 1e-9, f"token {t}")
    for got, wanted in zip(tensors_of(decoder.cache()), tensors_of(after), strict=True):
        assert_close(got, wanted, 1e-9, "state")


@each
def test_cached_sampling_rows_and_surprises(variant, rule):
    model, ids = ruled(variant, rule), ids_of(7)
    drawn = []
    for use_cache in (False, True):
        torch.manual_seed(4)
        drawn.append(model.sample(ids, N, use_cache=use_cache))
    assert drawn[0].equal(drawn[1])
    order, more = torch.tensor([1, 0, 1]), ids_of(N, seed=6)
    with torch.no_grad():
        _, cache, first = model(ids, return_cache=True, return_surprises=True)
        picked = model(more[order], cache=cache.rows(order), return_cache=True)[0]
        wanted, _, second = model(more, cache=cache, return_cache=True, return_surprises=True)
        assert_close(picked, wanted[order], 1e-11, "rows of a state")
        _, whole = model(torch.cat((ids, more), dim=1), return_surprises=True)
    persistent = 0 if variant == "mac" else SMALL["n_persistent"]
    chunk = 3 if rule == "lact" else 1
    tokens = (7 + N + persistent) // chunk * chunk - persistent  # of complete chunks
    for one, a, b in zip(whole[0], first[0], second[0], strict=True):
        assert one.shape == (2, 2, tokens)
        assert_close(torch.cat((a, b), dim=-1), one, 1e-9, "surprises")
