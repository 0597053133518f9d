"""Pages: when they are turned, where to, and what is written to them."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_pytorch import NeuralMemory
from titans_pytorch.gates.decay import circular_mean
from titans_pytorch.gates.limits import naive_trailing_quantile, trailing_quantile
from titans_pytorch.gates.paging import (
    HierarchicalRouter,
    KeyedRouter,
    SequentialRouter,
    active_rows,
    first_of_window,
    naive_turn_pages,
    turn_pages,
)

from .gates import DIM, float64, pages_of, told, told_memory
from .helpers import assert_close

# when a page is turned


def test_at_most_one_switch_in_a_call():
    memory = told_memory(symplectic_page_threshold=0.3)
    seq = told([0.1, 0.2, 0.4, 0.9, 0.1, 0.9])
    assert pages_of(memory, seq).tolist() == [[0, 0, 1, 1, 1, 1]]  # the chunk that triggers goes to the new page
    assert int(memory.page_switch_events) == 1
    _, state = memory(seq)
    assert state.active_page_indices.tolist() == [1]
    assert pages_of(memory, seq, state).tolist() == [[1, 1, 2, 2, 2, 2]]


def test_at_most_one_switch_in_a_batch_window_of_a_call():
    memory = told_memory(symplectic_page_threshold=0.3, batch_size=4)
    seq = told([0.4, 0.9, 0.1, 0.9, 0.1, 0.2, 0.9, 0.9])
    assert pages_of(memory, seq).tolist() == [[1, 1, 1, 2, 2, 2, 0, 0]]
    assert int(memory.page_switch_events) == 3
    # two calls open a window anew in its middle
    _, state = memory(seq[:, :2])
    assert pages_of(memory, seq[:, 2:], state).tolist() == [[2, 2, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize("pieces", [[18], [5, 1, 6, 2, 4], [2] * 9, [1] * 18])
def test_page_switch_every_counts_windows_from_the_start(pieces):
    memory = told_memory(symplectic_page_threshold=0.3, page_switch_every=6)
    seq = told([0.9, 0.1, 0.9, 0.1, 0.2, 0.1, 0.1, 0.9, 0.9])
    state, got = None, []
    for part in seq.split(pieces, dim=1):
        waiting = 0 if state is None else state.cache_store_segment.shape[1]
        if waiting + part.shape[1] >= 2:
            got += pages_of(memory, part, state)[0].tolist()
        _, state = memory(part, state=state)
    assert got == [1, 1, 1, 1, 1, 1, 1, 2, 2]


def test_rows_turn_pages_on_their_own():
    memory = told_memory(symplectic_page_threshold=0.3, page_switch_every=2)
    seq = torch.cat((told([0.1, 0.9, 0.1, 0.9]), told([0.9, 0.9, 0.9, 0.2]), told([0.0] * 4)))
    assert pages_of(memory, seq).tolist() == [[0, 1, 1, 2], [1, 2, 0, 0], [0, 0, 0, 0]]
    assert int(memory.page_switch_events) == 5


def test_the_threshold_can_be_set_at_any_time():
    memory = told_memory()
    seq = told([0.1, 0.45, 0.45])
    assert pages_of(memory, seq).tolist() == [[0, 0, 0]]
    memory.symplectic_page_threshold = 0.4
    assert pages_of(memory, seq).tolist() == [[0, 1, 1]]
    memory.symplectic_page_threshold = 0.45
    assert pages_of(memory, seq).tolist() == [[0, 0, 0]], "equal does not exceed"


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 7), st.integers(0, 5), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_pages_against_the_loop(rows, m, size, first, seed):
    """Parallel over chunks, for a router that depends on everything."""
    generator = torch.Generator().manual_seed(seed)
    pages = int(torch.randint(1, 6, (1,), generator=generator))
    complexity, angle = torch.rand(2, rows, m, generator=generator, dtype=torch.float64)
    start = torch.randint(0, pages, (rows,), generator=generator)
    exceeds = complexity > torch.rand(1, generator=generator)
    windows = torch.arange(first, first + m) // size
    starts = (windows * size - first).clamp(min=0)
    last = torch.randint(-1, first // size + 1, (rows,), generator=generator)

    def router(page, complexity, angle):
        return page * 2 + (complexity * 7).floor().long() - (angle * 3).floor().long()  # out of range, too

    switched = first_of_window(exceeds, starts, windows == last.unsqueeze(-1))
    page = turn_pages(start, switched, complexity, angle, router, pages)
    wanted = naive_turn_pages(start, exceeds, windows, last, complexity, angle, router, pages)
    assert torch.equal(page, wanted[0])
    assert torch.equal(switched, wanted[1])


# a threshold that follows the sequence


@given(st.integers(1, 3), st.integers(0, 30), st.integers(1, 12), st.floats(0, 1), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_trailing_quantiles(rows, n, window, quantile, fewest):
    x = torch.rand(rows, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    got, wanted = (f(x, quantile, window, fewest) for f in (trailing_quantile, naive_trailing_quantile))
    assert got.shape == (rows, n + 1)
    torch.testing.assert_close(got, wanted)


def test_pages_turn_above_a_quantile_of_the_complexity_before():
    memory = told_memory(pages=4, page_threshold_quantile=0.75, page_threshold_window=9, page_switch_every=2)
    memory.symplectic_page_threshold = 0.0  # of no account
    low = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]  # eight before a page is turned
    complexities = [*low, 0.55, 0.65, 0.6, 0.7, 0.9, 0.3]
    limits = [torch.tensor(complexities[max(0, i - 9) : i]).quantile(0.75).item() for i in range(8, 14)]
    page, wanted = 0, [0] * 8
    for complexity, limit in zip(complexities[8:], limits, strict=True):
        page = (page + (complexity > limit)) % 4
        wanted.append(page)
    assert wanted[-1] != 0
    seq = told(complexities)
    assert pages_of(memory, seq).tolist() == [wanted]
    got, state = [], None
    for part in seq.split(4, dim=1):
        got += pages_of(memory, part, state)[0].tolist()
        _, state = memory(part, state=state)
    assert got == wanted
    assert_close(state.recent_complexity, float64([complexities[-9:]]), 1e-12)


def test_equal_complexities_do_not_turn_pages():
    """They differ by rounding, and by how a sequence was cut into calls."""
    memory = told_memory(pages=2, page_threshold_quantile=0.5, page_switch_every=2)
    step = torch.finfo(torch.float64).eps
    assert pages_of(memory, told([0.3] * 9 + [0.3 + step, 0.3 + 4 * step])).tolist() == [[0] * 11]
    assert pages_of(memory, told([0.3] * 9 + [0.3 + 1e-9, 0.3])).tolist() == [[0] * 9 + [1, 1]]


# where to


def test_sequential_pages_go_round():
    memory = told_memory(pages=3, page_switch_every=2)
    assert pages_of(memory, told([0.9] * 7)).tolist() == [[1, 2, 0, 1, 2, 0, 1]]


def test_keyed_pages_follow_the_angle():
    memory = told_memory(pages=4, phase=True, manifold_state_keyed_paging=True, page_switch_every=2)
    angles = [-3.1, -1.6, -1.5, 0.1, 1.5, 1.6, 3.1, math.pi, -math.pi]
    wanted = [0, 0, 1, 2, 2, 3, 3, 3, 0]
    assert pages_of(memory, told([0.9] * 9, angles)).tolist() == [wanted]
    memory.symplectic_gate.phase = False  # without a phase: the next
    assert pages_of(memory, told([0.9] * 4, angles[:4])).tolist() == [[1, 2, 3, 0]]


def test_the_angle_is_the_circular_mean_of_the_chunk():
    assert_close(circular_mean(torch.tensor([[3.0, -3.0]])).abs(), torch.tensor([math.pi]), 1e-6)
    assert_close(circular_mean(torch.tensor([[0.1, 0.3]])), torch.tensor([0.2]), 1e-6)
    memory = told_memory(pages=4, phase=True, manifold_state_keyed_paging=True)
    seq = told([0.9, 0.1], [0.0, 0.0])
    seq[0, :2, 1] = torch.tensor([3.0, -2.9])  # just beyond pi; their plain mean is 0.05
    assert pages_of(memory, seq).tolist() == [[0, 0]]


def naive_hierarchy(page, complexity, angle, coarse, fine, mix):
    pages = coarse * fine
    following = (page + 1) % pages
    a = min(max(math.floor(complexity * coarse), 0), coarse - 1)
    b = following % fine
    if angle is not None:
        b = min(max(math.floor((angle + math.pi) / (2 * math.pi) * fine), 0), fine - 1)
    return round((1 - mix) * following + mix * (a * fine + b))


@pytest.mark.parametrize("phase", [True, False])
@pytest.mark.parametrize("mix", [1.0, 0.4, 0.5, 0.0])
def test_hierarchical_pages(mix, phase):
    generator = torch.Generator().manual_seed(0)
    complexity = (torch.rand(12, generator=generator) * 0.9 + 0.1).tolist() + [1.0]
    angles = ((torch.rand(13, generator=generator) * 2 - 1) * math.pi).tolist()
    memory = told_memory(
        pages=6,
        phase=phase,
        hierarchical_paging=True,
        coarse_pages=2,
        fine_pages=3,
        hierarchy_mix=mix,
        page_switch_every=2,
        symplectic_page_threshold=0.0,
    )
    page, wanted = 0, []
    for c, angle in zip(complexity, angles, strict=True):
        page = naive_hierarchy(page, c, angle if phase else None, 2, 3, mix)
        wanted.append(page)
    assert pages_of(memory, told(complexity, angles)).tolist() == [wanted]


@pytest.mark.parametrize(
    ("given", "split"),
    [((None, None), (1, 6)), ((3, None), (3, 2)), ((None, 6), (1, 6)), ((6, 1), (6, 1))],
)
def test_pages_split_into_coarse_and_fine(given, split):
    memory = told_memory(pages=6, hierarchical_paging=True, coarse_pages=given[0], fine_pages=given[1])
    router = memory.gates.stages[-1].router
    assert (router.coarse, router.fine) == split


@pytest.mark.parametrize("router", [SequentialRouter(4), KeyedRouter(4), HierarchicalRouter(2, 2)])
def test_routers_stay_within_the_pages(router):
    """What is not a number gets a page too: its row is lost anyway, and others must not be."""
    odd = torch.tensor([[math.nan, math.inf, -math.inf, -1.0, 2.0, 0.5]])
    switched = torch.ones(1, 6, dtype=torch.bool)
    for angle in (odd, None):
        page = turn_pages(torch.tensor([3]), switched, odd, angle, router, 4)
        assert ((page >= 0) & (page < 4)).all()


def test_a_router_of_ones_own():
    seen = []

    def back(page, complexity, angle):
        seen.append(angle)
        return page - 1  # clamped at page 0

    memory = told_memory(pages=3, page_router=back, page_switch_every=2)
    assert pages_of(memory, told([0.9] * 3)).tolist() == [[0, 0, 0]]
    assert seen == [None]

    memory = told_memory(pages=3, page_router=lambda page, complexity, angle: 2)
    assert pages_of(memory, told([0.9] * 2)).tolist() == [[2, 2]]

    class ByAngle:
        uses_phase = True

        def __call__(self, page, complexity, angle):
            return torch.where(angle > 0, 2, 1)

    memory = told_memory(pages=3, phase=True, page_router=ByAngle(), page_switch_every=2)
    assert pages_of(memory, told([0.9] * 3, [1.0, -1.0, 1.0])).tolist() == [[2, 1, 2]]


@pytest.mark.parametrize("named", ["2", None, torch.zeros(2, dtype=torch.long), torch.zeros(1, 2, 2, 3)])
def test_a_router_that_names_no_pages_is_named(named):
    memory = told_memory(pages=3, page_router=lambda page, complexity, angle: named)
    with pytest.raises(ValueError, match="^page_router must be .*, got a router that names "):
        memory(told([0.9] * 2))


@pytest.mark.parametrize("threshold", ["0.5", None, [0.5]])
def test_a_threshold_that_is_no_number_is_named(threshold):
    memory = told_memory()
    memory.symplectic_page_threshold = threshold
    with pytest.raises(ValueError, match="^symplectic_page_threshold must be a number.*, got "):
        memory(told([0.9]))


# what a page is


def test_heads_of_a_page_stand_together():
    active, rows = active_rows(torch.tensor([[0, 2, 1], [1, 1, 0]]), 3, 2)
    assert active.long().tolist() == [
        [1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 1], [0, 1, 0], [0, 1, 0],
        [0, 0, 1], [0, 0, 1], [1, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0],
    ]  # fmt: skip
    assert rows.tolist() == [[0, 4, 2], [1, 5, 3], [8, 8, 6], [9, 9, 7]]


@pytest.mark.parametrize("engine", ["auto", "matrix", "dual", "reference"])
@pytest.mark.parametrize("spectral", [False, True])
def test_an_inactive_page_does_not_move(engine, spectral):
    """Bit for bit, weights and momentum, with momentum left over from before; and the active one does move."""
    if engine == "dual" and spectral:
        return
    memory = told_memory(
        pages=3,
        engine=engine,
        heads=2,
        dim_head=4,
        momentum_order=2,
        learned_momentum_combine=True,
        learned_combine_include_zeroth=True,
        per_parameter_lr_modulation=True,
        spectral_norm_surprises=spectral,
        max_grad_norm=1.0,
        batch_size=4,
        page_switch_every=2,
        default_step_transform_max_lr=0.1,
    )
    _, state = memory(told([0.1, 0.1, 0.9, 0.1, 0.9, 0.1]))
    assert state.active_page_indices.tolist() == [2]
    _, after = memory(told([0.1, 0.1, 0.9, 0.1, 0.1]), state=state)  # page 2, then page 0
    still, moved = page_tensors(state, 3, 2), page_tensors(after, 3, 2)
    for name in still:
        assert torch.equal(still[name][1], moved[name][1]), name
        for page in (0, 2):
            assert not torch.equal(still[name][page], moved[name][page]), name
    assert all((still[name][1] != 0).any() for name in still if "momentum" in name), "there is some that could move it"


def page_tensors(state, pages, heads):
    """name -> [page ...] of a state of one row: memory and momentum."""
    out = {f"memory {k}": v.unflatten(0, (pages, heads)) for k, v in state.states[0].items()}
    return out | {f"momentum {k}": v.unflatten(1, (pages, heads)).transpose(0, 1) for k, v in state.states[1].items()}


def test_a_page_is_a_memory_of_its_own_chunks():
    """Two pages against two plain heads, each of which is shown its own chunks only. Momentum waits meanwhile."""
    memory = told_memory(pages=2, page_switch_every=4, symplectic_page_threshold=0.5, store_memory_loss_fn=None)
    with torch.no_grad():
        memory.symplectic_complexity_scale.zero_()
    seq = told([0.1, 0.2, 0.9, 0.1, 0.1, 0.9, 0.3, 0.4])
    written = pages_of(memory, seq)[0]
    assert written.tolist() == [0, 0, 1, 1, 1, 0, 0, 0]
    _, state = memory(seq)
    plain = NeuralMemory(DIM, 2, heads=2, dim_head=DIM, pre_rmsnorm=False).double()
    own = {k: v for k, v in memory.state_dict().items() if "symplectic" not in k}
    plain.load_state_dict(own)
    for page in range(2):
        chunks = seq.unflatten(1, (-1, 2))[:, written == page].flatten(1, 2)
        alone = page_tensors(plain(chunks)[1], 2, 1)
        for name, got in page_tensors(state, 2, 1).items():
            assert_close(got[page], alone[name][page], 1e-12, name)


def test_all_pages_are_read():
    memory = told_memory(pages=3)
    assert memory.internal_heads == 3
    seq = told([0.1, 0.2])
    out, _ = memory(seq)
    for page in range(3):
        other = copy.deepcopy(memory)
        with torch.no_grad():
            other.memory_model_parameters[1][page] += 1.0
        assert not torch.equal(other(seq)[0][:, 0], out[:, 0]), "the first token reads only initial weights"
