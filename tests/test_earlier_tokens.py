"""Where the tokens before a token are, in rows with padding and several texts."""

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from titans_pytorch.ops.earlier_tokens import EarlierTokens, earlier_tokens, naive_earlier_tokens


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 9), st.integers(0, 4), st.integers(0, 9))
def test_agrees_with_walking_back(n, back, seed):
    generator = torch.Generator().manual_seed(seed)
    present, resets = (torch.rand(3, n, generator=generator) < share for share in (0.6, 0.3))
    got, wanted = (f(present, resets, back) for f in (earlier_tokens, naive_earlier_tokens))
    assert got.valid.equal(wanted.valid)
    assert (got.index * got.valid).equal(wanted.index * wanted.valid)


def test_by_hand():
    """Two carried tokens 10 and 11, then 1, padding, 2, a text of 3 and 4."""
    x = torch.tensor([[[10.0], [11.0], [1.0], [float("inf")], [2.0], [3.0], [4.0]]])
    present = torch.tensor([[True, False, True, True, True]])
    earlier = earlier_tokens(present, torch.tensor([[False, False, False, True, False]]), 2)
    assert isinstance(earlier, EarlierTokens)
    assert earlier.shifted(x, 1).flatten()[present[0]].tolist() == [11.0, 1.0, 0.0, 3.0]
    assert earlier.shifted(x, 2).flatten()[present[0]].tolist() == [10.0, 11.0, 0.0, 0.0]
    assert earlier.tail(x).flatten().tolist() == [3.0, 4.0]
