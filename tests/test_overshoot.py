"""The gain of a memory is what its error changes by where a sequence repeats itself."""

import pytest
import torch

from titans_pytorch import MemoryMLP, NeuralMemory
from titans_pytorch.overshoot import overshoot_note, watch_gains

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
        tokens = memory.store_norm(seq)
        keys, step = memory.to_keys(tokens).unflatten(-1, (2, DIM)), memory.rates(tokens, 1, False).step
    wanted = 2 * WINDOW / DIM * (step * keys.square().sum(-1)).sum(-1).max()
    assert apart[0]["0"] == pytest.approx(float(wanted), rel=1e-9)


def test_what_is_not_watched():
    """A limit on the update, another loss, or surprises always at the initial weights: no gain to speak of."""
    others = (
        {"batch_size": None},
        {"max_grad_norm": 1.0},
        {"spectral_norm_surprises": True},
        {"mem_model_norm_add_residual": True},
    )
    others += ({"store_memory_loss_fn": lambda a, b: (a - b).abs().sum(-1)},)
    for changes in others:
        memory = memory_of(**changes)
        with watch_gains(memory) as gains:
            memory(torch.randn(1, 8, DIM, dtype=torch.float64))
        assert gains == {}


def test_the_note():
    assert overshoot_note({"a": 2.0, "b": 0.1}) is None
    assert overshoot_note({"a": 3.14159, "b": 0.1, "c": 20.0}) == (
        "on text that repeats itself memories may overshoot: 2 C theta is 3.1 in a, 20 in c, above 2; "
        "lower max_step or C"
    )
