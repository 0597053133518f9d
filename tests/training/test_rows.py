"""The loss on rows with targets."""

import pytest
import torch
from torch.nn import functional as F

from titans_pytorch.models.config import ModelConfig
from titans_pytorch.models.family import build_model
from titans_pytorch.training.rows import IGNORE, Rows, answers_in, loss_on

SMALL = {"variant": "lmm", "vocab_size": 12, "d_model": 8, "n_layers": 2, "n_heads": 2, "mem_heads": 2, "chunk_size": 4}


def model_of(**more):
    torch.manual_seed(0)
    return build_model(ModelConfig(**SMALL, **more)).double()


def rows():
    ids = torch.randint(0, 12, (2, 9), generator=torch.Generator().manual_seed(1))
    targets = torch.full((2, 9), IGNORE)
    targets[0, 3], targets[0, 8], targets[1, 5] = 1, 2, 3
    return Rows(ids, targets)


def test_only_what_is_asked_counts():
    model, asked = model_of(), rows()
    with torch.no_grad():
        logits = model(asked.ids).log_softmax(dim=-1).float()
        expected = -(logits[0, 3, 1] + logits[0, 8, 2] + logits[1, 5, 3]) / 3
        assert answers_in(asked) == 3
        assert float(loss_on(model, asked, 3.0)) == pytest.approx(float(expected), rel=1e-5)
        assert float(loss_on(model, asked, 6.0)) == pytest.approx(float(expected) / 2, rel=1e-5)
        ids = asked.ids
        plain = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        assert answers_in(ids) == 16
        assert float(loss_on(model, ids, 16.0)) == pytest.approx(float(plain), rel=1e-6)


def test_the_memorys_loss_joins_in_training():
    asked, plain, joined = rows(), model_of(), model_of(memory_loss_weight=0.5)
    with torch.no_grad():
        _, surprises = plain(asked.ids, return_surprises=True)
        extra = 0.5 * sum(float(loss.mean()) for loss, _ in surprises) / 2
        alone = float(loss_on(plain, asked, 3.0))
        assert float(loss_on(joined, asked, 3.0)) == pytest.approx(alone + extra, rel=1e-5)
        assert extra > 1e-3
        joined.eval()
        assert float(loss_on(joined, asked, 3.0)) == pytest.approx(alone, rel=1e-6)
