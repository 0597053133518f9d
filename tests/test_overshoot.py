"""The gain of a memory is what its error changes by where a sequence repeats itself."""

import math
import os
import random

import pytest
import torch

from titans_pytorch import MemoryMLP, NeuralMemory
from titans_pytorch.analysis.overshoot import Gains, overshoot_note, watch_gains
from titans_pytorch.rules.base import UpdateRule

from .random_models import STREAMS, random_model, read

DIM, WINDOW = 6, 4


def memory_of(max_step=0.4, **changes):
    torch.manual_seed(0)
    options = {
        "batch_size": WINDOW,
        "model": MemoryMLP(DIM, 1),
        "mem_model_norm_add_residual": False,
        "momentum": False,
        "init_decay_bias": -100.0,
        "default_step_transform_max_lr": max_step,
    }
    return NeuralMemory(DIM, **options | changes).double()


@pytest.mark.parametrize("changes", [{}, {"qk_rmsnorm": True}, {"qk_l2norm": True, "max_step": 4.0}])
@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_the_error_changes_by_the_gain(changes, factor):
    """A window of one token leaves 1 - gain of the error, its square of the loss."""
    memory = memory_of(**changes)
    memory.rates.step_transform.max_step *= factor
    token = torch.randn(1, 1, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with watch_gains(memory) as gains, torch.no_grad():
        _, _, (loss, _) = memory(token.expand(1, 2 * WINDOW, DIM), return_surprises=True)
    (gain,) = gains.values()
    assert loss[0, 0, WINDOW] / loss[0, 0, 0] == pytest.approx((1 - gain) ** 2, rel=1e-9)
    assert (gain > 2) == (loss[0, 0, WINDOW] > loss[0, 0, 0])


def test_a_rule_of_your_own_is_measured():
    """By its reads alone: the bound for text that repeats itself holds for the titans rule."""

    class Still(UpdateRule):
        def update(self, weights, surprise, slots, rates):
            return weights, slots

    memory = memory_of(momentum=True, init_decay_bias=None, update_rule=Still())
    token = torch.randn(1, 2 * WINDOW, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with watch_gains(memory) as gains, torch.no_grad():
        memory(token)
    assert gains == {"": 0.0}


def test_the_largest_of_all_calls_and_tokens():
    memory, other = memory_of(num_kv_per_token=2), memory_of(heads=2, dim_head=3, model=MemoryMLP(3, 2))
    model = torch.nn.ModuleList([memory, other])
    seq = torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    apart = []
    with torch.no_grad():
        for part in (seq, seq[:, :4], seq[:, 4:], seq[:, :0]):
            with watch_gains(model) as gains:
                memory(part), other(part)
            apart.append(dict(gains))
    assert apart[0].keys() == {"0", "1"}
    for name in "01":
        assert apart[0][name] == pytest.approx(max(apart[1][name], apart[2][name]), rel=1e-12)
    assert apart[3] == {}
    assert not memory.rates._forward_hooks
    with torch.no_grad():
        tokens = memory.projections.store_norm(seq)
        keys, step = (
            memory.projections.to_keys(tokens).unflatten(-1, (2, DIM)),
            memory.rates(tokens, 1, False).learning_rate,
        )
    wanted = 2 * WINDOW / DIM * (step * keys.square().sum(-1)).sum(-1).max()
    assert apart[0]["0"] == pytest.approx(float(wanted), rel=1e-9)


def test_every_memory_is_measured():
    """Without a limit 2 C theta |k|^2 / d of any token is the least, with one the gain is measured alone."""
    others = (
        {"batch_size": None},
        {"max_grad_norm": 1.0},
        {"spectral_norm_surprises": True},
        {"mem_model_norm_add_residual": True},
    )
    others += ({"store_memory_loss_fn": lambda a, b: (a - b).abs().sum(-1)},)
    for changes in others:
        memory, seq = memory_of(**changes), torch.randn(1, WINDOW, DIM, dtype=torch.float64)
        with watch_gains(memory) as gains, torch.no_grad():
            _, state = memory(seq)
        anchor, end = memory.init_weights(1), state.states[0]
        tokens = memory.projections.store_norm(seq)
        keys, values = memory.projections.to_keys(tokens)[:, None], memory.projections.to_values(tokens)[:, None]
        before, after = (
            memory.engine.read(memory.engine.still(0, weights).paths, keys, slice(0, 1)) for weights in (anchor, end)
        )
        wanted = ((after - before).norm() / (values - before).norm()).item()
        assert gains == pytest.approx({"": wanted}, rel=1e-9)


@pytest.mark.parametrize("cut", [1, 3, 8])
def test_a_transition_passes_a_share(cut):
    """A gated transition moves the memory by its share of the way alone."""
    token = torch.randn(1, 1, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = {}
    for gated in (False, True):
        memory = memory_of(gated_transition=gated, mem_model_norm_add_residual=True, init_adaptive_step_bias=3.0)
        with watch_gains(memory) as gains, torch.no_grad():
            state = None
            for part in token.expand(1, 8, DIM).split(cut, dim=1):
                _, state = memory(part, state=state)
        found[gated] = gains[""]
    assert found[True] < 0.05 * found[False]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("changes", [{}, {"gated_transition": True}, {"momentum": True, "num_kv_per_token": 2}])
def test_windows_of_several_mini_batches_tell_the_same(batch_size, changes):
    """The solve form writes them at once; every mini-batch is measured all the same, forgetting left out."""
    seq = torch.randn(2, 150, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for engine in ("solve", "dual", "sequential"):
        options = {"batch_size": batch_size, "init_decay_bias": 0.0, "qk_l2norm": True, "engine": engine}
        memory = memory_of(**options | changes)
        with watch_gains(memory) as gains, torch.no_grad():
            state = None
            for part in seq.split((70, 1, 79), dim=1):
                _, state = memory(part, state=state)
        found.append(gains[""])
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    assert found[0] == pytest.approx(found[2], rel=1e-9)


def test_the_first_token_that_is_lost():
    """The position is the same for any cut into calls, and others of the model keep their gains."""
    memory, other = memory_of(max_step=1e6, qk_rmsnorm=True), memory_of()
    model = torch.nn.ModuleDict({"memory": memory, "other": other})
    seq = torch.randn(1, 300, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        state = None
        for bad in range(300):
            _, state = memory(seq[:, bad : bad + 1], state=state)
            if not all(weight.isfinite().all() for weight in state.states[0].values()):
                break
        assert 50 < bad < 290
        for cut in (1, 5, 300):
            state = None
            with watch_gains(model) as gains:
                other(seq)
                for part in seq.split(cut, dim=1):
                    _, state = memory(part, state=state)
            assert abs(gains.lost["memory"] - bad) <= 1  # sums in another order
            assert gains["memory"] == math.inf
            assert gains.finite() == {"memory": None, "other": gains["other"]}
    assert f"not finite: memory from token {gains.lost['memory']} on; lower the largest step" in overshoot_note(gains)


def test_the_note():
    assert overshoot_note({"a": 2.0, "b": 0.1}) is None
    note = overshoot_note({"a": 3.14159, "b": 0.1, "c": 20.0})
    assert note.startswith("memories may overshoot: the gain of a mini-batch is 3.1 in a, 20 in c, above 2; lower")
    note = overshoot_note(Gains({"a": math.inf, "b": 3.0}, {"a": 640}))
    assert note.startswith(
        "not finite: a from token 640 on; memories may overshoot: the gain of a mini-batch is 3 in b"
    )


SEEDS = range(300) if os.environ.get("ALL_RANDOM_MODELS") else (9, 12, 20, 66, 103, 199, 248)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_model_is_finite_or_named(seed):
    """4,096 tokens; 48 of the 300 are lost. All of them: ALL_RANDOM_MODELS=1, 15 minutes."""
    kind, model, settings = random_model(seed)
    with watch_gains(model) as gains:
        finite = read(model, random.Random(seed).choice(STREAMS), 4096, seed)
    note = overshoot_note(gains)
    assert finite or (gains.lost and all(name in note for name in gains.lost)), (kind, settings)


def test_a_loss_without_a_least_value_has_no_gain():
    for name, chunk in (("linear_attention", {}), ("lact", {"chunk": 4})):
        memory = NeuralMemory.preset(name, 8, **chunk)
        with watch_gains(memory) as gains:
            memory(torch.randn(1, 12, 8))
        assert gains == {}


def test_a_window_multiplies_the_gain_of_repeated_tokens():
    """One token repeated, learning rate 0.1 for itself and 0.1 times one half for each of the three before it."""
    memory = NeuralMemory(
        8, 1, batch_size=4, surprise_window=4, default_step_transform_max_lr=0.1, learned_step=False, qk_l2norm=True,
        momentum=False, mem_model_norm_add_residual=False, default_model_kwargs={"depth": 1},
    )  # fmt: skip
    torch.nn.init.zeros_(memory.rates.to_window_weights.weight)
    torch.nn.init.zeros_(memory.rates.to_window_weights.bias)
    with watch_gains(memory) as gains:
        memory(torch.randn(1, 1, 8).repeat(1, 16, 1))
    assert gains[""] == pytest.approx(2 * 4 * 0.1 * (1 + 3 / 2) / 8, rel=1e-4)
