"""Law 7 for each rule that has a name: copies, autograd modes, precision, checkpoints, transforms, saved states."""

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from titans_pytorch import NeuralMemory, mem_state_detach
from titans_pytorch.memory.named.registry import NAMED

from ..helpers import assert_close, assert_same_gradients, gradients, randomise
from .subjects import SHORT

each_rule = pytest.mark.parametrize("name", NAMED)
DIM, N = 8, 14


def built(name, dtype=torch.float64):
    torch.manual_seed(0)
    memory = randomise(NeuralMemory.preset(name, DIM, heads=2, **SHORT.get(name, {})).to(dtype), scale=0.1)
    return memory, torch.randn(2, N, DIM, generator=torch.Generator().manual_seed(1), dtype=dtype)


@each_rule
def test_copies_and_modes_agree(name):
    memory, seq = built(name)
    wanted = memory(seq)[0]
    for twin in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert torch.equal(twin(seq)[0], wanted)
    other = NeuralMemory.preset(name, DIM, heads=2, **SHORT.get(name, {})).double()
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other(seq)[0], wanted)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            first, state = memory(seq[:, :5])
            second, _ = memory(seq[:, 5:], state=state)
        assert_close(torch.cat((first, second), dim=1), wanted, 1e-7, mode.__name__)


@each_rule
def test_a_state_survives_a_table(name):
    memory, seq = built(name)
    _, state = memory(seq[:, :7])
    state = mem_state_detach(state)
    again = type(state).from_tensordict(state.to_tensordict())
    assert torch.equal(memory(seq[:, 7:], state=again)[0], memory(seq[:, 7:], state=state)[0])
    row = type(state).from_tensordict(state.to_tensordict()[1:])
    assert_close(memory(seq[1:, 7:], state=row)[0][0], memory(seq[:, 7:], state=state)[0][1], 1e-7)


@each_rule
def test_checkpoints_and_transforms(name):
    memory, seq = built(name)
    leaves = dict(memory.named_parameters()) | {"seq": seq.requires_grad_()}
    wanted = memory(seq)[0]
    got = checkpoint(lambda x: memory(x)[0], seq, use_reentrant=False)
    assert torch.equal(got, wanted)
    assert_same_gradients(gradients([got], leaves), gradients([wanted], leaves), 1e-9)
    mapped = torch.func.vmap(lambda row: memory(row.unsqueeze(0))[0][0])(seq)
    assert_close(mapped, wanted, 1e-7)


@each_rule
def test_half_precision_is_near(name):
    """Tokens and slow parameters in bfloat16; the fast weights stay in float32."""
    memory, seq = built(name, torch.float32)
    with torch.no_grad():
        wanted = memory(seq)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed, state = memory(seq)
        half, _ = memory.bfloat16()(seq.bfloat16())
    assert all(w.dtype == torch.float32 for w in state.states[0].values())
    # orthogonalised updates of chunks of fewer tokens than features magnify rounding
    near = 0.5 if name == "lact" else 0.15
    for out in (mixed.float(), half.float()):
        assert (out - wanted).square().mean().sqrt() < near * wanted.square().mean().sqrt()
