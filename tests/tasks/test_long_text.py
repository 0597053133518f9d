import math

import pytest
import torch
from torch import nn

from titans_pytorch.tasks.long_text import LongText, PasskeyInText


def test_windows_of_a_text(text_file):
    text = LongText(str(text_file), length=50)
    held_out = text.text.held_out
    windows = text.windows(4)
    assert windows.shape == (4, 51)
    assert torch.equal(windows[0], held_out[:51])
    assert torch.equal(windows[-1], held_out[-51:])
    with pytest.raises(ValueError, match="length must be less than the text's held-out part.*, got 100000"):
        LongText(str(text_file), length=100000)


def test_bits_by_position(text_file):
    """A model that knows every byte of the second half of a window, and nothing of the first."""
    text = LongText(str(text_file), length=40)
    windows = {tuple(w[:-1]): w[1:] for w in text.windows(3).long().tolist()}

    class Knows(nn.Module):
        def forward(self, ids):
            logits = torch.zeros(1, 40, 256)
            following = windows[tuple(ids[0].tolist())]
            logits[0, torch.arange(20, 40), following[20:]] = 1000.0
            return logits

    assert text.bits_by_position(Knows(), windows=3, parts=2) == pytest.approx([8.0, 0.0], abs=1e-6)
    uniform = text.bits_by_position(lambda_module(torch.zeros(1, 40, 256)), windows=2, parts=4)
    assert uniform == pytest.approx([math.log2(256)] * 4)


def lambda_module(value):
    class Constant(nn.Module):
        def forward(self, ids):
            return value

    return Constant()


def test_a_passkey_in_a_text(text_file):
    task = PasskeyInText(data=str(text_file), length=200, digits=3)
    rows = task.batch(0, 5)
    for ids, targets in zip(rows.ids.tolist(), rows.targets.tolist(), strict=True):
        text, key = bytes(ids).decode(), bytes(targets[-3:]).decode()
        assert text.count(f"The pass key is {key}. Remember it: {key} is the pass key.") == 1
        assert text.endswith(f"The pass key is {key[:2]}")
    with pytest.raises(ValueError, match="length must be less than .*, got 9999999"):
        task.batch(0, 1, length=9999999)
