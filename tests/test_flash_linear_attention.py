"""The delta family against somebody else's code: the naive recurrences of flash-linear-attention, in float32.

It is no dependency, since it needs Triton: `pip install flash-linear-attention triton` in an environment with this
package, then `pytest tests/test_flash_linear_attention.py`.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F

from titans_pytorch import NeuralMemory

from .helpers import assert_close, assert_same_gradients, gradients, randomise

pytest.importorskip("fla", reason="flash-linear-attention is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")
HEADS, D, N = 2, 8, 70


def recurrences():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no GPU
        from fla.ops.delta_rule.naive import delta_rule_recurrence
        from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
        from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
    return delta_rule_recurrence, naive_recurrent_gated_delta_rule, naive_recurrent_linear_attn


def theirs(name, q, k, v, rates, start):
    """q, k, v [b h n d], rates of NeuralMemory, start [b h d d] -> (reads [b h n d], last state [b h d d])."""
    delta, gated, linear = recurrences()
    beta, keep = (x.unflatten(0, (-1, HEADS)) for x in (rates.learning_rate.squeeze(-1) * 2 / D, rates.retention))
    q = q * D**0.5  # they divide by it
    if name == "deltanet":
        return delta(q, k, v, beta, start)

    def flip(x):
        return x.transpose(1, 2)

    if name == "gated_deltanet":
        args = (flip(q), flip(k), flip(v), flip(beta), flip(keep.log()))
        out, end = gated(*args, initial_state=start, output_final_state=True)
    else:
        q, k = F.elu(q / D**0.5) + 1, F.elu(k) + 1
        out, end = linear(flip(q) * D**0.5, flip(k), flip(v), initial_state=start, output_final_state=True)
    return flip(out), end


@pytest.mark.parametrize("name", ["linear_attention", "deltanet", "gated_deltanet"])
def test_agrees_with_flash_linear_attention(name):
    torch.manual_seed(0)
    memory = randomise(NeuralMemory.preset(name, HEADS * D, heads=HEADS), scale=0.1)
    seq = torch.randn(2, N, HEADS * D, requires_grad=True)
    reads = []
    memory.projections.multihead_rmsnorm.register_forward_pre_hook(lambda module, args: reads.append(args[0]))
    _, state = memory(seq)
    (end,) = state.states[0].values()

    views = memory.chunk_views(seq)
    keys, values, _ = memory.projections.keys_and_values(*views, 1, None)
    queries, _ = memory.projections.queries(memory.projections.retrieve_norm(seq), None)
    k, v = (x.squeeze(2).unflatten(0, (-1, HEADS)) for x in (keys, values))
    (start,) = memory.init_weights(2).values()
    wanted = theirs(name, queries, k, v, memory.rates_of(views.keys, False), start.unflatten(0, (-1, HEADS)))

    got = (reads[0], end.unflatten(0, (-1, HEADS)))
    for ours, other, what in zip(got, wanted, ("reads", "last state"), strict=True):
        assert_close(ours, other, 1e-4, what)
    used = {n: p for n, p in memory.named_parameters() if n.startswith(("rates", "memory_model", "projections.to_"))}
    used |= {"seq": seq}
    assert_same_gradients(gradients(list(got), used), gradients(list(wanted), used), 1e-3)
