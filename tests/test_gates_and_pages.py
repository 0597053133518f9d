"""Memories with gates and pages as modules: off is off, states, copies, modes, wrong arguments."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from titans_pytorch import NeuralMemory, NeuralMemState, SymplecticGating, mem_state_detach
from titans_pytorch.gates.stages import GateCarry

from .gates import DIM, Told, rates
from .helpers import assert_same_tensors, gradients, randomise, refusal

# off is off

OFF = {
    "num_pages": 1,
    "manifold_state_keyed_paging": True,
    "hierarchical_paging": True,
    "symplectic_page_threshold": 0.5,
    "symplectic_gate_kwargs": {"phase_mix": 0.5},
    "page_switch_every": 4,
    "kinetics_mix": 0.5,
    "page_threshold_quantile": 0.5,
}


def test_off_is_off():
    """Nothing is computed, carried or learned, whatever else is said of what is not used."""

    def build(**options):
        torch.manual_seed(0)
        return NeuralMemory(DIM, 2, batch_size=4, **options)

    plain, off = build(), build(**OFF)
    assert off.gates.stages == ()
    assert off.symplectic_gate is None
    assert off.page_switch_events == 0
    assert list(off.named_buffers()) == []
    assert {k: v.shape for k, v in off.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    seq = torch.randn(2, 9, DIM)
    (out, state), (wanted, _) = off(seq), plain(seq)
    assert torch.equal(out, wanted)
    assert all(value is None for value in GateCarry.of(state))


def test_what_is_shared_with_the_plain_memory_starts_alike():
    def build(**options):
        torch.manual_seed(0)
        return NeuralMemory(DIM, 2, heads=2, dim_head=3, **options).state_dict()

    plain, gated = build(), build(use_symplectic_gating=True, symplectic_gate_kwargs={"phase_mix": 0.5})
    assert set(gated) > set(plain)
    assert all(torch.equal(gated[name], value) for name, value in plain.items())


# a module like others


def used_memory(**options):
    options = {"use_symplectic_gating": True, "num_pages": 3, "symplectic_page_threshold": 0.05} | options
    torch.manual_seed(0)
    return NeuralMemory(DIM, 2, page_switch_every=4, qk_rmsnorm=True, default_step_transform_max_lr=0.1, **options)


EVERYTHING = {
    "use_dmd_gating": True,
    "combine_symplectic_and_dmd": True,
    "symplectic_gate_kwargs": {"phase_mix": 0.5, "quorum_mix": 0.5, "budget_topk_ratio": 0.5},
    "hierarchical_paging": True,
    "kinetics_coupling": True,
    "kinetics_mix": 0.5,
    "page_threshold_quantile": 0.5,
}
each = pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["default", "everything"])


@each
def test_the_state_is_carried_saved_and_cut(options):
    memory, seq = used_memory(**options), torch.randn(3, 47, DIM)
    wanted, last = memory(seq)
    first, state = memory(seq[:, :33])
    cut = mem_state_detach(state)
    assert not any(value.requires_grad for value in GateCarry.of(cut) if value is not None)
    again = NeuralMemState.from_tensordict(cut.to_tensordict(3))
    for carried in (state, cut, again, copy.deepcopy(cut), pickle.loads(pickle.dumps(cut))):
        for value, same in zip(GateCarry.of(carried), GateCarry.of(state), strict=True):
            assert value is same is None or torch.equal(value, same)
        before = [None if value is None else value.clone() for value in GateCarry.of(carried)]
        out, end = memory(seq[:, 33:], state=carried)
        torch.testing.assert_close(torch.cat((first, out), dim=1), wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(end.active_page_indices, last.active_page_indices)
        for value, same in zip(GateCarry.of(carried), before, strict=True):
            assert value is None or torch.equal(value, same), "a state passed in is not modified"
    rows = NeuralMemState.from_tensordict(cut.to_tensordict(3)[1:])
    torch.testing.assert_close(memory(seq[1:, 33:], state=rows)[0], wanted[1:, 33:], rtol=1e-4, atol=1e-5)


@each
def test_copies_and_state_dicts_agree(options):
    memory, seq = used_memory(**options), torch.randn(2, 30, DIM)
    wanted, _ = memory(seq)
    assert int(memory.page_switch_events) > 0
    assert torch.equal(copy.deepcopy(memory)(seq)[0], wanted)
    assert torch.equal(pickle.loads(pickle.dumps(memory))(seq)[0], wanted)
    other = used_memory(**options)
    other.load_state_dict(randomise(memory, 5).state_dict())
    assert torch.equal(other(seq)[0], memory(seq)[0])


@each
def test_modes_agree(options):
    memory, seq = used_memory(**options), torch.randn(2, 30, DIM)
    wanted, _ = memory(seq)
    with torch.inference_mode():
        torch.testing.assert_close(memory(seq)[0], wanted)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = memory(seq)
        again, _ = memory(seq, state=state)
    assert out.isfinite().all()
    assert again.isfinite().all()
    half = copy.deepcopy(memory).bfloat16()
    assert half(seq.bfloat16())[0].isfinite().all()


def test_compiles_without_a_graph_break():
    memory, seq = used_memory(**EVERYTHING), torch.randn(2, 30, DIM)

    def decide(seq):
        _, gated = rates(memory, seq)
        memory.gates._count(gated)
        return gated.rates.retention, gated.rates.learning_rate, gated.carry, gated.choice.page

    wanted, counted = decide(seq), int(memory.page_switch_events)
    assert counted > 0
    got = torch.compile(decide, backend="eager", fullgraph=True)(seq)
    torch.testing.assert_close(got, wanted)
    assert int(memory.page_switch_events) == 2 * counted


@each
def test_checkpointing_counts_switches_once(options):
    memory, seq = used_memory(**options), torch.randn(2, 30, DIM)
    leaves = dict(memory.named_parameters())
    wanted = gradients([memory(seq)[0]], leaves)
    counted = int(memory.page_switch_events)
    assert counted > 0
    out = checkpoint(lambda x: memory(x)[0], seq, use_reentrant=False)
    got = gradients([out], leaves)
    assert_same_tensors(got, wanted, 1e-5)
    assert int(memory.page_switch_events) == 2 * counted


def test_every_part_learns():
    memory = randomise(used_memory(**EVERYTHING), 3, 0.1)
    grads = gradients([memory(torch.randn(2, 60, DIM))[0]], dict(memory.named_parameters()))
    for name in (
        "gates.symplectic_complexity_scale",
        "gates.dmd_complexity_scale",
        "gates.symplectic_gate.to_phase.weight",
    ):
        assert (grads[name] != 0).any(), name


# wrong arguments

GATE = {"use_symplectic_gating": True}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_pages": 2}, "num_pages"),
        ({"num_pages": 0}, "num_pages"),
        ({"num_pages": 2.0, **GATE}, "num_pages"),
        ({"num_pages": True, **GATE}, "num_pages"),
        ({"use_dmd_gating": True, **GATE}, "combine_symplectic_and_dmd"),
        ({"num_pages": 4, "hierarchical_paging": True, "coarse_pages": 3, **GATE}, "coarse_pages"),
        ({"num_pages": 4, "hierarchical_paging": True, "fine_pages": 5, **GATE}, "coarse_pages"),
        ({"num_pages": 4, "hierarchical_paging": True, "coarse_pages": 2, "fine_pages": 3, **GATE}, "coarse_pages"),
        ({"coarse_pages": 0}, "coarse_pages"),
        ({"fine_pages": -1}, "fine_pages"),
        ({"hierarchy_mix": 1.1}, "hierarchy_mix"),
        ({"hierarchy_mix": -0.1}, "hierarchy_mix"),
        ({"kinetics_mix": 1.5}, "kinetics_mix"),
        ({"kinetics_mix": float("nan")}, "kinetics_mix"),
        ({"kinetics_eps": 0.0}, "kinetics_eps"),
        ({"symplectic_page_threshold": "0.5"}, "symplectic_page_threshold"),
        ({"symplectic_page_threshold": float("nan")}, "symplectic_page_threshold"),
        ({"page_switch_every": 3}, "page_switch_every"),
        ({"page_switch_every": 0}, "page_switch_every"),
        ({"dmd_window": 1}, "dmd_window"),
        ({"page_threshold_quantile": 2.0}, "page_threshold_quantile"),
        ({"page_threshold_window": 0}, "page_threshold_window"),
        ({"page_threshold_window": 7}, "page_threshold_window"),  # of so few no quantile is taken: never a switch
        ({"page_router": 3}, "page_router"),
        ({"symplectic_gate": "gate", **GATE}, "symplectic_gate"),
        ({"symplectic_gate": Told()}, "symplectic_gate"),
        ({"symplectic_gate": Told(), "symplectic_gate_kwargs": {}, **GATE}, "symplectic_gate_kwargs"),
        ({"symplectic_gate_kwargs": 3, **GATE}, "symplectic_gate_kwargs"),
        ({"symplectic_gate_kwargs": {"gates": 3}, **GATE}, "symplectic_gate_kwargs"),
        ({"symplectic_gate_kwargs": {"phase_mix": 2.0}, **GATE}, "phase_mix"),
        ({"symplectic_gate_kwargs": {"top_k": 2, "adaptive_topk_ratio": 0.5}, **GATE}, "top_k"),
        ({"symplectic_gate_kwargs": {"budget_topk_ratio": 0.5}, **GATE}, "budget_topk_ratio"),
        ({"symplectic_gate_kwargs": {"codebook_topk": 20}, **GATE}, "codebook_topk"),
    ],
)
def test_wrong_arguments_are_named(options, name):
    with pytest.raises(ValueError, match=refusal(name)):
        NeuralMemory(DIM, 2, **options)


@pytest.mark.parametrize(
    ("answer", "manifold"),
    [
        (lambda x: x[..., 0], False),
        (lambda x: x, False),
        (lambda x: x[:, 1:, :1], False),
        (lambda x: None, False),
        (lambda x: x[..., :1], True),
        (lambda x: (x[..., :1], {"angle": x}), True),
        (lambda x: (x[..., :1], {"phase_angle": x[:, 1:]}), True),
        (lambda x: (x[..., :2], None), True),
    ],
)
def test_a_gate_that_returns_something_else_is_named(answer, manifold):
    class Odd(nn.Module):
        def forward(self, tokens, return_manifold_state=False):
            return answer(tokens)

    pages = {"num_pages": 2, "manifold_state_keyed_paging": True} if manifold else {}
    memory = NeuralMemory(DIM, 2, symplectic_gate=Odd(), **GATE, **pages)
    with pytest.raises(ValueError, match="^symplectic_gate must be .*, got "):
        memory(torch.randn(1, 4, DIM))


def test_a_gate_over_the_whole_sequence_is_refused():
    whole = SymplecticGating(DIM, quorum_mix=0.5, budget_topk_ratio=0.5)
    with pytest.raises(ValueError, match=r"^symplectic_gate.context must be .*, got None"):
        NeuralMemory(DIM, symplectic_gate=whole, **GATE)
    memory = NeuralMemory(DIM, **GATE)
    memory.symplectic_gate = whole
    with pytest.raises(ValueError, match=r"^symplectic_gate.context must be .*, got None"):
        memory(torch.randn(1, 4, DIM))


@pytest.mark.parametrize("field", ["gate_tokens", "active_page_indices", "last_switch", "recent_complexity"])
def test_a_state_of_another_shape_is_named(field):
    memory = used_memory(page_threshold_quantile=0.5)
    _, state = memory(torch.randn(2, 30, DIM))
    state = state._replace(**{field: getattr(state, field)[:1]})
    with pytest.raises(ValueError, match=f"^state.{field} must be .*, got "):
        memory(torch.randn(2, 4, DIM), state=state)
