"""Gates, pages and kinetics against the fork of titans-pytorch that they come from, in float64, where results have to
be equal (docs/migrating.md). vectors/fork.pt holds, for each case, the constructor's arguments, weights, inputs of
successive calls and results."""

import json
from pathlib import Path

import pytest
import torch

from titans_pytorch import MemoryAsContextTransformer, NeuralMemory, load_peer_state_dict
from titans_pytorch.interop.peer import translate_memory_keys

from .helpers import assert_close

RATES = ("to_adaptive_step", "to_momentum", "to_decay_factor")
IN_FORK = {f"rates.{rate}.{kind}": f"{rate}.0.{kind}" for rate in RATES for kind in ("weight", "bias")}
VECTORS = Path(__file__).parent / "vectors"
CASES = torch.load(VECTORS / "fork.pt", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_fork(name):
    case = CASES[name]
    memory = NeuralMemory(**json.loads(case["kwargs"])).double()
    load_peer_state_dict(memory, case["state_dict"])
    state = None
    for seq, wanted in zip(case["seqs"], case["outs"], strict=True):
        out, state = memory(seq, state=state)
        assert_close(out, wanted, what="retrieved")
    for key, wanted in case["last"].items():
        assert_close(state.states[0][key], wanted, what=f"memory {key}")
    pages = case["pages"]
    assert (state.active_page_indices is None) == (pages is None)
    assert pages is None or torch.equal(state.active_page_indices, pages)
    assert memory.page_switch_events == case["switches"]

    (out * case["probe"]).sum().backward()
    gradients = {key: p.grad for key, p in memory.named_parameters()}
    for key, wanted in translate_memory_keys(memory, case["grad"]).items():
        assert_close(gradients[key], wanted, what=f"gradient of {key}")


def test_the_pages_differ_between_rows():
    """So that a router that names one page for all does not pass."""
    routed = [case["pages"] for name, case in CASES.items() if "keyed" in name or "hierarchical" in name]
    assert len(routed) == 3
    assert all(len(set(pages.tolist())) > 1 for pages in routed)


def test_what_the_fork_adds_to_a_checkpoint():
    """A counter of switches, and scales of shape (1,)."""
    gates = {"use_symplectic_gating": True, "use_dmd_gating": True, "combine_symplectic_and_dmd": True, "num_pages": 2}

    memory, other = NeuralMemory(4, 2, **gates), NeuralMemory(4, 2, **gates)
    saved = {IN_FORK.get(key, key): value for key, value in memory.state_dict().items()}
    saved["symplectic_complexity_scale"] = torch.tensor([0.25])
    saved["page_switch_events"] = torch.tensor([7])

    load_peer_state_dict(other, saved)
    assert other.symplectic_complexity_scale == 0.25
    assert other.page_switch_events == 0, "it counts from here on"
    assert torch.equal(other.rates.to_momentum.weight, memory.rates.to_momentum.weight)
    assert torch.equal(other.symplectic_gate.to_twist_q.weight, memory.symplectic_gate.to_twist_q.weight)

    saved["symplectic_complexity_scale"] = torch.tensor([0.25, 0.5])
    with pytest.raises(ValueError, match=r"symplectic_complexity_scale of shape \(2,\) for \(\)"):
        load_peer_state_dict(other, saved)


def test_what_the_fork_adds_to_the_layers_of_a_transformer():
    vector = torch.load(VECTORS / "mac_gate.pt", weights_only=True)
    kwargs = json.loads(vector["kwargs"]) | {"neural_memory_kwargs": {"use_symplectic_gating": True}}
    model, saved = MemoryAsContextTransformer(**kwargs).double(), dict(vector["state_dict"])
    for index in range(kwargs["depth"]):
        for part in ("q", "k"):
            saved[f"layers.{index}.4.symplectic_gate.to_twist_{part}.weight"] = torch.randn(32, 32).double()
        saved[f"layers.{index}.4.symplectic_complexity_scale"] = torch.tensor([0.125 * index]).double()
        saved[f"layers.{index}.4.page_switch_events"] = torch.tensor([3])
    load_peer_state_dict(model, saved)
    memories = [layer.memory for layer in model.layers]
    assert [memory.symplectic_complexity_scale.item() for memory in memories] == [0.0, 0.125]
    assert torch.equal(
        memories[1].symplectic_gate.to_twist_k.weight, saved["layers.1.4.symplectic_gate.to_twist_k.weight"]
    )
    # a scale of 0 in all layers leaves the logits of the transformer without gates
    with torch.no_grad():
        memories[1].symplectic_complexity_scale.zero_()
        assert_close(model(vector["ids"]), vector["logits"], 1e-5, what="logits")
