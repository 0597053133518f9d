"""SegmentedAttention: the fast paths against a full mask, causality, pieces with a cache, half precisions."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_pytorch.layers import attention
from titans_pytorch.layers.attention import RotaryPositions, SegmentedAttention
from titans_pytorch.ops.segmented_attention import naive_segmented_attention, segmented_attention

from .helpers import refusal


def draw(*shape, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=grad)


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3)
    return module


def close(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


RULES = st.fixed_dictionaries({"window": st.integers(1, 7), "sliding": st.booleans()})


@settings(max_examples=60, deadline=None)
@given(RULES, st.integers(1, 30), st.integers(0, 3), st.integers(0, 99))
def test_equals_a_full_mask_with_gradients(rule, n, persist, seed):
    q, k, v = (draw(2, 2, n, 4, seed=seed + i, grad=True) for i in range(3))
    persistent = draw(2, 2, persist, 4, seed=seed + 3, grad=True)
    probe = draw(2, 2, n, 4, seed=seed + 4)
    fast = segmented_attention(q, k, v, persistent, scale=0.7, **rule)
    slow = naive_segmented_attention(q, k, v, persistent, scale=0.7, **rule)
    close(fast, slow)
    inputs = (q, k, v, persistent) if persist else (q, k, v)
    got, expected = (torch.autograd.grad((out * probe).sum(), inputs) for out in (fast, slow))
    for a, b in zip(got, expected, strict=True):
        close(a, b)


def test_what_a_query_sees_is_as_documented():
    """Uniform attention over one-hot values shows which keys were averaged."""
    q = k = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    v, persistent = torch.eye(7, dtype=torch.float64)[None, None], torch.zeros(2, 1, 0, 7, dtype=torch.float64)
    seen = {}
    for sliding in (False, True):
        out = segmented_attention(q, k, v, persistent, window=3, sliding=sliding, scale=1.0)[0, 0]
        seen[sliding] = [row.nonzero().flatten().tolist() for row in out]
    assert seen[False] == [[0], [0, 1], [0, 1, 2], [3], [3, 4], [3, 4, 5], [6]]
    assert seen[True] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]]


@settings(max_examples=60, deadline=None)
@given(
    st.booleans(),
    st.booleans(),
    st.integers(1, 5),
    st.integers(0, 2),
    st.integers(0, 2),
    st.lists(st.integers(1, 14), min_size=1, max_size=6),
)
def test_any_pieces_equal_the_whole(sliding, residual, segment_len, persist, longterm, pieces):
    attn = randomised(
        SegmentedAttention(
            8, segment_len, persist, longterm, dim_head=4, heads=2, sliding=sliding, accept_value_residual=residual
        )
    )
    n = sum(pieces)
    seq, v1 = draw(2, n, 8), draw(2, 2, n, 4, seed=1) if residual else None
    whole, (values, end) = attn(seq, value_residual=v1)

    outs, cache, at = [], None, 0
    for piece in pieces:
        part = None if v1 is None else v1[:, :, at : at + piece]
        out, (_, cache) = attn(seq[:, at : at + piece], value_residual=part, cache=cache)
        assert cache.keys.shape[-2] <= segment_len + longterm
        outs.append(out)
        at += piece
    close(torch.cat(outs, dim=1), whole)
    close(cache.keys, end.keys)
    close(cache.values, end.values)
    assert cache.position == end.position == n
    assert values.shape == (2, 2, n, 4)


@pytest.mark.parametrize("sliding", [False, True])
def test_causal(sliding):
    attn = randomised(SegmentedAttention(8, 4, 2, 1, dim_head=4, heads=2, sliding=sliding))
    seq = draw(1, 23, 8)
    out = attn(seq)[0]
    for t in (0, 4, 5, 11, 21):
        changed = seq.clone()
        changed[:, t + 1 :] += 1
        assert torch.equal(attn(changed)[0][:, : t + 1], out[:, : t + 1])
        assert not torch.equal(attn(changed)[0][:, t + 1 :], out[:, t + 1 :])


def test_value_residual_mixes_towards_the_first_layers_values():
    attn = randomised(SegmentedAttention(8, 4, dim_head=4, heads=2, accept_value_residual=True))
    seq, v1 = draw(1, 9, 8), draw(1, 2, 9, 4, seed=1)
    with torch.no_grad():
        attn.to_value_mix.weight.zero_()
        attn.to_value_mix.bias.copy_(torch.tensor([-1e9, 1e9]))
    values = attn(seq, value_residual=v1)[1].value_residual
    own = attn.to_qkv(attn.norm(seq))[..., 16:].unflatten(-1, (2, 4)).transpose(1, 2)
    close(values[:, 1], v1[:, 1])
    close(values[:, 0], own[:, 0])


def test_output_gating_multiplies_the_output():
    attn = randomised(SegmentedAttention(8, 4, dim_head=4, heads=2))
    seq, gate = draw(1, 9, 8), draw(1, 9, 8, seed=1)
    close(attn(seq, output_gating=gate)[0], attn(seq)[0] * gate)


def test_rotary_turns_pairs_by_absolute_position():
    rotary = RotaryPositions(4).double()
    t = draw(1, 1, 3, 4)
    as_complex = torch.view_as_complex(t.unflatten(-1, (2, 2)).contiguous())
    angle = torch.arange(5, 8, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.01], dtype=torch.float64)
    expected = torch.view_as_real(as_complex * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    close(rotary.rotate(t, start=5), expected, tol=1e-6)  # frequencies were rounded to float32


def test_half_precision_keeps_the_frequencies():
    attn = SegmentedAttention(8, 4, dim_head=8, heads=1)
    before = attn.rotary_emb.freqs.clone()
    half = deepcopy(attn).bfloat16()
    assert half.to_qkv.weight.dtype == torch.bfloat16
    assert torch.equal(half.rotary_emb.freqs, before)
    t = draw(1, 1, 1, 8).float()
    far = half.rotary_emb.rotate(t, start=1001) - half.rotary_emb.rotate(t, start=1000)
    assert far.abs().max() > 0.1
    seq = draw(1, 9, 8).float()
    torch.testing.assert_close(half(seq.bfloat16())[0].float(), attn(seq)[0], rtol=0.05, atol=0.02)


def test_flex_attention_is_never_used_on_cpu():
    attn = randomised(SegmentedAttention(8, 4, 2, dim_head=4, heads=2, use_flex_attn=True))
    seq = draw(1, 9, 8).requires_grad_()
    out = attn(seq)[0]
    assert torch.equal(out, attn(seq, disable_flex_attn=True)[0])
    out.sum().backward()  # flex attention has no backward on CPU


@pytest.mark.parametrize("sliding", [False, True])
def test_flex_attention_agrees(sliding, monkeypatch):
    """On CUDA compiled, with gradients; elsewhere eager, values only, which is all that there is."""
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    if not cuda:
        monkeypatch.setattr(attention, "_compiled_flex", lambda: attention.flex_attention)
    tensors = [draw(2, 2, 150, 16, seed=i).float().to(device).requires_grad_(cuda) for i in range(3)]
    persistent = draw(2, 2, 3, 16, seed=3).float().to(device).requires_grad_(cuda)
    rule = {"window": 20, "sliding": sliding, "scale": 0.3}
    flex = attention.flex_segmented_attention(*tensors, persistent, **rule)
    sdpa = segmented_attention(*tensors, persistent, **rule)
    tol = 1e-2 if cuda else 1e-5
    torch.testing.assert_close(flex, sdpa, rtol=tol, atol=tol)
    if cuda:
        grads = [torch.autograd.grad(out.square().sum(), (*tensors, persistent)) for out in (flex, sdpa)]
        torch.testing.assert_close(*grads, rtol=tol, atol=tol)


def test_dropout_acts_in_training_only():
    attn = randomised(SegmentedAttention(8, 4, dim_head=4, heads=2, attend_kwargs={"dropout": 0.5}))
    plain = deepcopy(attn)
    plain.dropout = 0.0
    seq = draw(1, 40, 8)
    torch.manual_seed(0)
    assert not torch.allclose(attn(seq)[0], plain(seq)[0])
    assert torch.equal(attn.eval()(seq)[0], plain(seq)[0])


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"dim": 0}, "dim"),
        ({"segment_len": 0}, "segment_len"),
        ({"segment_len": 2.5}, "segment_len"),
        ({"num_persist_mem_tokens": -1}, "num_persist_mem_tokens"),
        ({"num_longterm_mem_tokens": -1}, "num_longterm_mem_tokens"),
        ({"dim_head": 3}, "dim_head"),
        ({"heads": 0}, "heads"),
        ({"attend_kwargs": {"dropout": 1.5}}, "attend_kwargs"),
        ({"attend_kwargs": {"talking_heads": True}}, "attend_kwargs"),
        ({"attend_kwargs": {"dropout": 0.1}, "use_flex_attn": True}, "use_flex_attn"),
    ],
)
def test_bad_arguments_are_named(kwargs, name):
    with pytest.raises(ValueError, match=refusal(name)):
        SegmentedAttention(**{"dim": 8, "segment_len": 4, "dim_head": 4, "heads": 2, **kwargs})


def test_bad_inputs_are_named():
    attn = SegmentedAttention(8, 4, dim_head=4, heads=2)
    for shape in ((3, 8), (1, 3, 7), (1, 0, 8)):
        with pytest.raises(ValueError, match="^seq must be .*, got "):
            attn(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"^value_residual needs accept_value_residual=True"):
        attn(torch.zeros(1, 3, 8), value_residual=torch.zeros(1, 2, 3, 4))
    with pytest.raises(ValueError, match="^accept_value_residual needs value_residual"):
        SegmentedAttention(8, 4, dim_head=4, heads=2, accept_value_residual=True)(torch.zeros(1, 3, 8))
