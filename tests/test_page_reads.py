"""Reads from the active page only."""

import copy

import pytest
import torch

from titans_pytorch import NeuralMemory
from titans_pytorch.gates.reading import EntryPages, hidden_heads
from titans_pytorch.models.mac import MACLayer
from titans_pytorch.ops.positions import Reads

from .gates import DIM, pages_of, told, told_memory
from .helpers import assert_close


def reading_alone(memory, page):
    """The same memory, whose output sees one page's heads: those of the others meet zeros in the last map."""
    alone = copy.deepcopy(memory)
    alone.reads_one_page = False
    of_head = torch.arange(memory.internal_heads).repeat_interleave(memory.dim_head) // memory.heads
    with torch.no_grad():
        alone.projections.combine_heads.weight[:, of_head != page] = 0.0
    return alone


@pytest.mark.parametrize("chunk", [2, (2, 4), (5, 2), (3, 3)])
@pytest.mark.parametrize("pieces", [[24], [7, 1, 1, 9, 6], [1] * 24])
def test_a_token_reads_the_page_of_the_last_chunk_it_sees(chunk, pieces):
    group, store = (chunk, chunk) if isinstance(chunk, int) else chunk
    memory = told_memory(chunk, read_active_page_only=True, page_switch_every=store, heads=2, dim_head=4)
    seq = told([0.1, 0.9, 0.1, 0.9, 0.9, 0.2, 0.1, 0.9, 0.1, 0.1, 0.9, 0.1])[:, :24]
    written = pages_of(memory, seq)[0].tolist()
    assert set(written) == {0, 1, 2}
    entries = [(t + 1) // group * group // store for t in range(24)]
    wanted_pages = [([0] + written)[entry] for entry in entries]
    alone = [reading_alone(memory, page)(seq)[0] for page in range(3)]
    wanted = torch.stack([alone[page][:, t] for t, page in enumerate(wanted_pages)], dim=1)
    state, got = None, []
    for part in seq.split(pieces, dim=1):
        out, state = memory(part, state=state)
        got.append(out)
    assert_close(torch.cat(got, dim=1), wanted, 1e-12)
    assert not torch.allclose(wanted, alone[0])
    assert not torch.allclose(wanted, reading_alone(memory, 1)(seq)[0])


def test_what_is_read_on_a_page_outlives_what_is_written_on_others():
    """Bit for bit, turned back to; a memory that reads all pages sees the difference."""
    question = told([0.0])[:, :1]
    for alone in (True, False):
        memory = told_memory(pages=2, page_switch_every=2, read_active_page_only=alone)
        _, before = memory(told([0.1, 0.2]))
        _, after = memory(told([0.9, 0.3, 0.1]), state=before)
        assert after.active_page_indices.tolist() == [1]
        turned = after._replace(active_page_indices=torch.tensor([0]))
        assert torch.equal(memory(question, state=before)[0], memory(question, state=turned)[0]) is alone


def test_given_weights_are_read_on_a_given_page():
    memory = told_memory(pages=3, heads=2, dim_head=4, read_active_page_only=True)
    seq = told([0.1, 0.9, 0.2])
    _, state = memory(seq)
    weights = state.states[0]
    for page in range(3):
        wanted = reading_alone(memory, page).retrieve_memories(seq, weights)
        assert_close(memory.retrieve_memories(seq, weights, page=torch.tensor([page])), wanted, 1e-12)
    pages = torch.tensor([[0, 0, 2, 2, 1, 1]])
    got = memory.retrieve_memories(seq, weights, page=pages)
    assert_close(got[:, 2:4], reading_alone(memory, 2).retrieve_memories(seq, weights)[:, 2:4], 1e-12)
    for wrong in (None, 1, torch.tensor([0, 1]), torch.tensor([0.0])):
        with pytest.raises(ValueError, match="^page must be the page that is read.*, got "):
            memory.retrieve_memories(seq, weights, page=wrong)
    # a memory that reads all pages takes none
    pooled = told_memory(pages=3, heads=2, dim_head=4)
    assert torch.equal(pooled.retrieve_memories(seq, weights), pooled.retrieve_memories(seq, weights, page=None))


def test_one_page_is_read_as_ever():
    torch.manual_seed(0)
    plain = NeuralMemory(DIM, 2, heads=2, dim_head=4)
    same = NeuralMemory(DIM, 2, heads=2, dim_head=4, read_active_page_only=True)
    same.load_state_dict(plain.state_dict())
    seq = torch.randn(2, 9, DIM)
    out, state = same(seq)
    assert torch.equal(plain(seq)[0], out)
    assert state.read_page is None


def test_a_page_that_is_missing_is_named():
    memory = told_memory((4, 2), pages=2, read_active_page_only=True)
    _, state = memory(told([0.1, 0.9, 0.1]))
    assert state.read_page.tolist() == [1]  # token 6 reads the memory after token 3
    with pytest.raises(ValueError, match="^state.read_page must be the page that goes with read_weights.*, got None"):
        memory(told([0.1]), state=state._replace(read_page=None))


def test_a_layer_that_reads_before_the_page_is_known_refuses():
    memory = NeuralMemory(8, 2, use_symplectic_gating=True, num_pages=2, read_active_page_only=True)
    with pytest.raises(ValueError, match="^MAC cannot be combined with read_active_page_only"):
        MACLayer(8, heads=2, memory=memory)


def test_entries_and_heads():
    pages = EntryPages(3, torch.tensor([[0, 1, 1], [2, 2, 0]]), heads=2, pages=3, older=torch.tensor([1, 0]))
    # chunks of 2, groups of 4: tokens 5, 6 read entry 2 (older), 7 to 10 entry 4
    read = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 2, 2, 2, 2]])
    assert pages.hidden(5, 6, Reads(4, 2)).equal(hidden_heads(read, 2, 3))
    assert pages.at(5).tolist() == [1, 0]
    hidden = hidden_heads(torch.tensor([[0, 1, 0]]), heads=2, pages=2)
    assert hidden.long().tolist() == [[[0, 1, 0]] * 2 + [[1, 0, 1]] * 2]
