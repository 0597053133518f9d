"""NeuralMemory against the released package: outputs, losses, steps, carried state and gradients, in float64.

The vectors were made with titans-pytorch 0.5.5; each holds the constructor's arguments, weights, inputs and results.
"""

import json
from pathlib import Path

import pytest
import torch

import titans_pytorch
from titans_pytorch import NeuralMemory, load_peer_state_dict
from titans_pytorch.interop.peer import translate_memory_keys

from .helpers import assert_close

VECTORS = sorted((Path(__file__).parent / "vectors").glob("memory_*.pt"))


def decode(value):
    if isinstance(value, dict) and "__model__" in value:
        name, kwargs = value["__model__"]
        return getattr(titans_pytorch, name)(**kwargs)
    if isinstance(value, dict) and "__silu__" in value:
        return torch.nn.SiLU()
    return value


def load(path: Path, engine: str):
    vector = torch.load(path, weights_only=True)
    kwargs = {k: decode(v) for k, v in json.loads(vector["kwargs"]).items()}
    memory = NeuralMemory(**kwargs, engine=engine).double()
    load_peer_state_dict(memory, vector["state_dict"])
    return vector, memory


def test_the_vectors_are_there():
    assert len(VECTORS) == 20


@pytest.mark.parametrize("engine", ["reference", "auto", "dual", "matrix"])
@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem.removeprefix("memory_"))
def test_agrees_with_the_peer(path, engine):
    if engine == "dual" and path.stem == "memory_spectral":
        engine = "matrix"  # the dual form has no built update to orthogonalise
    vector, memory = load(path, engine)
    state, outs = None, []
    calls = zip(vector["seqs"], vector["masks"], vector["outs"], vector["losses"], vector["lrs"], strict=True)
    for seq, mask, out, loss, step in calls:
        got, state, (got_loss, got_step) = memory(seq, state=state, store_mask=mask, return_surprises=True)
        outs.append(got)
        assert_close(got, out, what="retrieved")
        assert_close(got_loss, loss, what="loss")
        assert_close(got_step, step, what="step")

    assert state.seq_index == vector["seq_index"]
    waiting = vector["cached"]
    assert_close(state.cache_store_segment, waiting, what="waiting tokens")
    for name, wanted in vector["last"].items():
        assert_close(state.states[0][name], wanted, what=f"memory {name}")
    assert set(state.states[1]) == set(vector["momentum"])
    for name, wanted in vector["momentum"].items():
        assert_close(state.states[1][name], wanted, what=f"momentum {name}")

    sum((out * probe).sum() for out, probe in zip(outs, vector["probe"], strict=True)).backward()
    wanted = translate_memory_keys(memory, vector["grads"])
    if not memory.memory_model_parameters.per_head:  # the peer's gradients go to its template then
        for i, name in enumerate(memory.memory_model_parameters.names):
            wanted[f"memory_model_parameters.{i}"] = vector["grads"][f"memory_model.{name}"]
    got = {name: p.grad for name, p in memory.named_parameters()}
    assert set(got) == set(wanted)
    for name in wanted:
        assert_close(got[name], wanted[name], what=f"gradient of {name}")


def test_what_does_not_fit_is_named():
    vector, memory = load(VECTORS[0], "auto")
    state = dict(vector["state_dict"])
    state["to_keys.extra"] = state.pop("to_keys.weight")
    with pytest.raises(ValueError, match="missing projections.to_keys.weight; left over projections.to_keys.extra"):
        load_peer_state_dict(memory, state)
    state = dict(vector["state_dict"], **{"to_queries.weight": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match=r"to_queries.weight of shape \(3, 3\)"):
        load_peer_state_dict(memory, state)
    with pytest.raises(ValueError, match="module must be .*, got Linear"):
        load_peer_state_dict(torch.nn.Linear(2, 2), {})
