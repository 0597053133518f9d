"""A stream whose state is not finite warns, once, with rows, position and name."""

import copy
import pickle
import re
import warnings

import pytest
import torch

from titans_pytorch import MemoryAsContextTransformer, MemoryDiverged, NeuralMemory, TitansConfig, build_model
from titans_pytorch.memory.diverged import warn_if_diverged

DIM = 8


def memory_of(**changes) -> NeuralMemory:
    torch.manual_seed(0)
    return NeuralMemory(DIM, 4, batch_size=8, mem_model_norm_add_residual=False, **changes)


def seq_with(bad: int, row: int = 1, rows: int = 3, tokens: int = 1024) -> torch.Tensor:
    """Finite, but for one token."""
    seq = 0.1 * torch.randn(rows, tokens, DIM, generator=torch.Generator().manual_seed(0))
    seq[row, bad] = torch.nan
    return seq


def read(memory, seq, piece: int, mode=torch.no_grad) -> list[str]:
    """The warnings of reading it in pieces."""
    state = None
    with mode(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for part in seq.split(piece, dim=1):
            _, state = memory(part, state=state)
    return [str(one.message) for one in told if one.category is MemoryDiverged]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("piece", [1, 100, 256, 512])
def test_it_warns_once(piece, mode):
    (said,) = read(memory_of(), seq_with(300), piece, mode)
    assert "NeuralMemory: the fast weights of rows 1 of 3 are not finite from token " in said
    assert "lower default_step_transform_max_lr" in said
    position, _, rest = said.partition("from token ")[2].partition(";")[0].partition(" on")
    if "or earlier" not in rest:  # seen in the updates of the call before: its mini-batch
        assert 295 <= int(position) <= 303
    else:
        assert int(position) <= 300 + 256


def test_a_finite_stream_says_nothing():
    assert read(memory_of(default_step_transform_max_lr=0.01), seq_with(300).nan_to_num(), 100) == []
    assert read(memory_of(), seq_with(300), 1024) == []  # no state was carried


def test_a_stream_that_diverges_by_itself():
    memory = memory_of(default_step_transform_max_lr=100.0, qk_rmsnorm=True)
    (said,) = read(memory, torch.randn(2, 1024, DIM), 256)
    assert "rows 0, 1 of 2" in said


def test_the_filter_turns_it_off_or_into_an_error():
    memory = memory_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemoryDiverged)
        for _ in range(2):
            with pytest.raises(MemoryDiverged):
                read_plainly(memory)
        warnings.simplefilter("ignore", MemoryDiverged)
        read_plainly(memory)


@torch.no_grad()
def read_plainly(memory) -> None:
    state = None
    for part in seq_with(3).split(256, dim=1):
        _, state = memory(part, state=state)


def test_the_name_within_a_model():
    ids = torch.randint(0, 32, (1, 600))
    kwargs = {"default_step_transform_max_lr": 1e3, "mem_model_norm_add_residual": False}
    common = {"num_tokens": 32, "dim": 16, "depth": 2, "segment_len": 8, "neural_memory_layers": (2,)}
    mac = MemoryAsContextTransformer(**common, neural_memory_batch_size=8, neural_memory_kwargs=kwargs)
    config = TitansConfig.tiny(variant="lmm", d_model=16, vocab_size=32, max_step=1e9, qk_norm="rms")
    for model, name in ((mac, "layers.1.memory"), (build_model(config, torch.device("cpu")), "blocks.")):
        cache = None
        with torch.no_grad(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for part in ids.split(256, dim=1):
                _, cache = model(part, cache=cache, return_cache=True)
        said = [str(one.message) for one in told if one.category is MemoryDiverged]
        assert said
        assert all(re.match(rf"{name}\S* \(NeuralMemory\): ", one) for one in said)
        labels = {module.label for module in model.modules() if isinstance(module, NeuralMemory)}
        assert labels == {name for name, module in model.named_modules() if isinstance(module, NeuralMemory)}


def test_transforms_and_copies():
    memory = memory_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemoryDiverged)
        _, state = memory(seq_with(3, tokens=256))
        state = state._replace(updates=None)

        name = next(iter(state.states[0]))

        def go(weight):
            warn_if_diverged(memory, state._replace(states=({name: weight}, {})), 256)
            return weight

        torch.vmap(go)(state.states[0][name][None])  # there are no numbers to look at
        with pytest.raises(MemoryDiverged):
            go(state.states[0][name])
    read(memory, seq_with(3), 256)
    assert memory.told_diverged
    assert pickle.loads(pickle.dumps(memory)).told_diverged
    assert copy.deepcopy(memory).told_diverged
    assert "told_diverged" not in memory.state_dict()


@pytest.mark.slow
def test_it_compiles_without_a_break():
    memory = memory_of()
    step = torch.compile(lambda x, state: memory(x, state=state)[0], fullgraph=True, backend="eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", MemoryDiverged)
        _, state = memory(seq_with(3, tokens=256))
        memory_now, momentum = (dict(part) for part in state.states)
        state = state._replace(weights=dict(state.weights), states=(memory_now, momentum), updates=None)
        step(torch.randn(3, 256, DIM), state)
