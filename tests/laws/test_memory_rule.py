"""The rule itself: the memory against a twin that does one thing after the other, over random option sets."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from titans_pytorch.rules.losses import HuberLoss

from ..helpers import assert_close, assert_same_gradients, gradients
from ..naive_memory import NaiveMemory
from .subjects import AXES, DIM, MODELS, Subject, option_sets, store_chunk, tolerance

WITHOUT_GATES = {"use_symplectic_gating": False, "use_dmd_gating": False, "kinetics_coupling": False, "num_pages": 1}
WITHOUT_GATES |= {"page_threshold_quantile": None, "symplectic_gate": None}
WITHOUT_GATES["update_rule"] = None  # the twin is of the paper's rule
PLAIN = {name: values[0] for name, values in AXES} | WITHOUT_GATES


def twins(subject, options):
    """The naive twin of the subject's memory, and of the earlier one."""
    batch = options["batch_chunks"]
    keywords = options | {"batch_size": None if batch is None else batch * store_chunk(options)}
    model = MODELS[options["model"]](options["dim_head"] or DIM).double()
    earlier = subject.earlier and NaiveMemory(subject.earlier, model, keywords)
    return NaiveMemory(subject.memory, model, keywords), earlier


def agrees(options, n, masked):
    subject, limit = Subject(options), tolerance(options)
    naive, naive_earlier = twins(subject, options)
    seq = subject.sequence(2, n).requires_grad_()
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(n)) > 0.4 if masked else None
    leaves = subject.parameters | {"seq": seq}

    before = naive_earlier and naive_earlier(seq, mask)[1]
    wanted, rows = naive(seq, mask, before)
    flat = [row for heads in rows for row in heads]
    got, (_, state), (loss, step, *_) = subject(seq, mask=mask)

    assert_close(got, wanted, limit, "retrieved")
    chunks = n // store_chunk(options)
    assert state.seq_index == chunks * store_chunk(options)
    if chunks:
        losses, steps = (torch.stack([torch.cat(getattr(row, k)) for row in flat]) for k in ("losses", "steps"))
        assert_close(loss.flatten(0, 1), losses, limit, "loss")
        assert_close(step.flatten(0, 1), steps, limit, "step")
    ours = list(subject.memory.memory_model_parameters.names)
    carried, wanted_carried = [], []
    for name, key in zip(ours, naive.names, strict=True):
        built = torch.stack([torch.stack([memory[key] for memory in row.memories]) for row in flat])
        assert_close(state.updates[name], built, limit, f"updates {name}")
        carried.append(state.states[0][name]), wanted_carried.append(built[:, -1])
        if subject.memory.engine.rule.slots:
            momentum = torch.stack(
                [torch.stack([row.momentum[k][key] for row in flat]) for k in range(subject.memory.engine.rule.slots)]
            )
            assert_close(state.states[1][name], momentum, limit, f"momentum {name}")
            carried.append(state.states[1][name]), wanted_carried.append(momentum)
    wanted_grads = gradients([wanted, *wanted_carried], leaves)
    assert_same_gradients(gradients([got, *carried], leaves), wanted_grads, limit * 100)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(option_sets, st.integers(1, 9), st.booleans())
def test_agrees_with_the_rule(options, n, masked):
    agrees(options | WITHOUT_GATES, n, masked)


@pytest.mark.parametrize("model", MODELS)
def test_every_model(model):
    agrees(PLAIN | {"model": model, "chunk_size": 2, "batch_chunks": 2}, 9, masked=True)


@pytest.mark.parametrize("chunk_size", [1, 3, (2, 4), (3, 2), (5, 3), (1, 4), (4, 1)])
@pytest.mark.parametrize("model", ["mlp", "foreign"])
def test_every_timing(chunk_size, model):
    agrees(
        PLAIN | {"model": model, "chunk_size": chunk_size, "batch_chunks": 1, "gated_transition": True},
        11,
        masked=False,
    )


PAPER = {"chunk_size": 1, "batch_chunks": 3, "activation": nn.SiLU(), "qk_l2norm": True}
PAPER_PARTS = {
    "convolution": {"qkv_conv_kernel": 4},
    "convolution of pairs": {"qkv_conv_kernel": 3, "num_kv_per_token": 2, "heads": 2, "qkv_receives_diff_views": True},
    "convolution, lookahead": {"qkv_conv_kernel": 3, "chunk_size": 3, "store_with_lookahead_value": True},
    "unit norm": {"dim_head": 4},
    "sigmoid gate": {"output_gate": "sigmoid"},
    "threshold": {"surprise_threshold": 1.5},
    "threshold, order 2": {"surprise_threshold": 1.5, "momentum_order": 2, "learned_momentum_combine": True},
    "threshold, pairs": {"surprise_threshold": 1.5, "num_kv_per_token": 2, "chunk_size": 2},
    "threshold, lookahead": {"surprise_threshold": 1.5, "chunk_size": 3, "store_with_lookahead_value": True},
    "threshold, not tokenwise": {"surprise_threshold": 1.5, "chunk_size": 3, "model": "attention"},
    "threshold, orthogonal": {"surprise_threshold": 1.5, "spectral_norm_surprises": True},
    "prediction": {"surprise_threshold": 1.5, "surprise_source": "prediction"},
    "prediction, pairs": {"surprise_threshold": 1.5, "surprise_source": "prediction", "num_kv_per_token": 2},
    "SiLU gate": {"output_gate": "silu", "heads": 2, "dim_head": 4},
}


@pytest.mark.parametrize("part", PAPER_PARTS)
def test_the_papers_memory(part):
    """Section 4.4: convolution, SiLU, unit norm, normalised and gated output."""
    agrees(PLAIN | PAPER | PAPER_PARTS[part], 8, masked=True)


@pytest.mark.parametrize("model", ["foreign", "polynomial"])
@pytest.mark.parametrize("loss", [None, HuberLoss()])
@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("pairs", [1, 2])
def test_surprise_windows(loss, chunk_size, pairs, model):
    """Masked tokens are in no window, and none reaches back before the stream."""
    options = {"surprise_window": 3, "chunk_size": chunk_size, "num_kv_per_token": pairs, "store_memory_loss_fn": loss}
    agrees(PLAIN | options | {"batch_chunks": 2, "model": model, "heads": 2}, 7, masked=True)
