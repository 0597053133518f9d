import gzip
import lzma
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_script import TinyModel

from titans_pytorch.training import evaluate
from titans_pytorch.training.evaluate import (
    bits_per_byte,
    compressors,
    estimate_bits_per_byte,
    readable,
    sample_text,
    windows,
)


def bytes_of(length, seed=0):
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@given(length=st.integers(2, 300), context=st.integers(1, 40), data=st.data())
def test_windows_score_every_byte_once_in_order(length, context, data):
    stride = data.draw(st.integers(1, context))
    scored = []
    for start, inputs, count in windows(length, context, stride):
        assert start >= 0
        assert start + inputs < length
        assert 1 <= count <= inputs <= context
        scored += range(start + inputs - count + 1, start + inputs + 1)
        assert start == 0 or inputs - count >= context - stride  # what came before the first byte scored
    assert scored == list(range(1, length))


def naive_bits(model, data, context, stride):
    """One byte at a time, each from the window that scores it."""
    total = 8.0
    for start, inputs, count in windows(len(data), context, stride):
        for place in range(start + inputs - count + 1, start + inputs + 1):
            seen = data[start:place].long()[None]
            total -= model(seen)[0, -1].log_softmax(-1)[data[place].long()].item() / math.log(2)
    return total / len(data)


@pytest.mark.parametrize(("length", "context", "stride"), [(50, 8, 4), (50, 8, 8), (50, 7, 3), (5, 16, 8), (2, 4, 1)])
@torch.no_grad()
def test_bits_per_byte_is_that_of_a_byte_at_a_time(length, context, stride):
    torch.manual_seed(0)
    model = TinyModel(8).double().eval()
    data = bytes_of(length)
    expected = naive_bits(model, data, context, stride)
    model.train()  # the evaluation turns dropout off, and puts the mode back
    for batch_size in (1, 3, 64):
        found = bits_per_byte(model, data, context=context, stride=stride, batch_size=batch_size)
        assert found == pytest.approx(expected, rel=1e-6)  # logits are taken in float32
    assert model.training


class Knows(torch.nn.Module):
    """Is certain of the byte that follows in a repeating 0, 1, 2, ..., 9."""

    def forward(self, ids):
        return torch.nn.functional.one_hot((ids + 1) % 10, 256) * 1e4


def test_bits_per_byte_of_a_model_that_knows():
    data = (torch.arange(101) % 10).to(torch.uint8)
    assert bits_per_byte(Knows(), data, context=7, stride=3, batch_size=2) == pytest.approx(8 / 101)


def test_it_says_how_long_it_takes(monkeypatch):
    """21 windows in 7 passes of one second each: the estimate is of the second pass, with five to go."""
    clock = iter(range(100))
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: float(next(clock)) / 2)
    said = []
    bits_per_byte(Knows(), bytes_of(64), context=3, stride=3, batch_size=3, say=said.append)
    assert said == ["evaluation of 64 bytes in 21 windows, about 3 s"]
    said.clear()
    bits_per_byte(Knows(), bytes_of(8), context=3, stride=3, batch_size=3, say=said.append)
    assert said == []


def test_bad_windows():
    with pytest.raises(ValueError, match="stride must be 1 to context = 8, got 9"):
        bits_per_byte(Knows(), bytes_of(20), context=8, stride=9, batch_size=1)
    with pytest.raises(ValueError, match="data must have at least 2 bytes, got 1"):
        bits_per_byte(Knows(), bytes_of(1), context=8, stride=4, batch_size=1)


def test_the_estimate_over_all_windows_is_their_mean_loss():
    torch.manual_seed(0)
    model = TinyModel(8).eval()
    data = bytes_of(31)
    expected = torch.stack(
        [model(data[s : s + 11].long()[None], return_loss=True) for s in (0, 10, 20)]
    ).mean() / math.log(2)
    found = estimate_bits_per_byte(
        model, data, seq_len=10, sequences=3, batch_size=2, device="cpu", autocast=torch.no_grad
    )
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_compressors():
    data = torch.tensor(list(b"abab" * 500), dtype=torch.uint8)
    found = compressors(data)
    raw = b"abab" * 500
    assert found["order-0 entropy"] == pytest.approx(1.0)
    assert found["gzip -9"] == 8 * len(gzip.compress(raw, 9)) / len(raw)
    assert found["xz"] == 8 * len(lzma.compress(raw)) / len(raw)


def test_sampled_text_depends_on_its_seed_alone():
    model = TinyModel(8)
    prime = bytes_of(4)
    write = {"temperature": 1.0, "device": torch.device("cpu"), "autocast": torch.no_grad}
    before = torch.get_rng_state()
    first = sample_text(model, prime, 20, seed=1, **write)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    torch.rand(3)
    assert sample_text(model, prime, 20, seed=1, **write) == first
    assert sample_text(model, prime, 20, seed=2, **write) != first


def test_text_for_a_terminal():
    assert readable(list(b"a\x1b[2J\n\t\xff\xc3\xa9")) == "a�[2J\n\t�é"
