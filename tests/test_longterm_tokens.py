"""Where long-term tokens stand, and positions with them, against the obvious loop."""

import torch
from axial_positional_embedding import ContinuousAxialPositionalEmbedding
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_pytorch.axial_positions import axial_positions
from titans_pytorch.longterm_tokens import insert_longterm, places, remove_longterm


def naive_insert(tokens, longterm, segment_len, start):
    out = []
    for index, token in enumerate(tokens, start=start):
        if index > 0 and index % segment_len == 0:
            out.extend(longterm)
        out.append(token)
    return out


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(0, 3), st.integers(1, 6), st.integers(0, 20))
def test_equals_the_loop_from_any_token_on(n, longterm, segment_len, start):
    tokens = torch.arange(1.0, n + 1)[None, :, None].repeat(2, 1, 1)
    memories = -torch.arange(1.0, longterm + 1)[:, None]
    out = insert_longterm(tokens, memories, segment_len, start)
    assert out[1, :, 0].tolist() == naive_insert(range(1, n + 1), range(-1, -longterm - 1, -1), segment_len, start)
    assert out.shape[1] == places(start + n, segment_len, longterm) - places(start, segment_len, longterm)
    assert torch.equal(remove_longterm(out, longterm, segment_len, start, n), tokens)


def test_count_of_the_definition():
    """p * floor((n - 1) / segment_len) of them: none behind a segment that ends the sequence."""
    assert [places(n, 4, 3) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 4, 8, 11, 15]


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 40), st.integers(1, 9))
def test_positions_equal_the_librarys_grid(n, start, width):
    torch.manual_seed(0)
    embedding = ContinuousAxialPositionalEmbedding(dim=3, num_axial_dims=2).double()
    for total in (start + n, start + n + 30):  # a longer sequence changes nothing
        whole = embedding.forward_with_seq_len(total, (width,))
        torch.testing.assert_close(axial_positions(embedding, start, n, width, whole), whole[start : start + n])
