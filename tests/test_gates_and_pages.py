"""Gates, kinetics and pages in the memory: what the decay becomes, which page is written, and when it is turned."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from titans_pytorch import NeuralMemory, NeuralMemState, SymplecticGating, mem_state_detach
from titans_pytorch.dmd import naive_dmd_error
from titans_pytorch.gating.decay import between_0_and_1, circular_mean
from titans_pytorch.gating.kinetics import kinetics
from titans_pytorch.gating.limits import naive_trailing_quantile, trailing_quantile
from titans_pytorch.gating.paging import (
    HierarchicalRouter,
    KeyedRouter,
    SequentialRouter,
    active_rows,
    first_of_window,
    naive_turn_pages,
    turn_pages,
)
from titans_pytorch.gating.stages import GateCarry

from .helpers import assert_close, assert_same_tensors, gradients, randomise

DIM = 6


class Told(nn.Module):
    """A gate that reads complexity off the tokens' first feature, and an angle off the second. Keeps what it saw."""

    def __init__(self, phase=False):
        super().__init__()
        self.phase, self.seen = phase, []

    def forward(self, tokens, return_manifold_state=False):
        self.seen.append(tokens)
        complexity = tokens[..., :1].clamp(0.0, 1.0)
        if not return_manifold_state:
            return complexity
        return complexity, ({"phase_angle": tokens[..., 1:2]} if self.phase else None)


def told_memory(chunk=2, pages=3, phase=False, **options):
    """A memory whose pages follow the tokens themselves."""
    memory = NeuralMemory(
        DIM,
        chunk,
        pre_rmsnorm=False,
        use_symplectic_gating=True,
        num_pages=pages,
        symplectic_gate=Told(phase),
        **options,
    )
    return randomise(memory.double(), 1, 0.2)


def told(complexities, angles=None, chunk=2):
    """[1 m*chunk d]: the first token of each chunk carries its complexity, every one its angle."""
    seq = torch.randn(1, len(complexities) * chunk, DIM, generator=torch.Generator().manual_seed(0)).double()
    seq[..., 0] = 0.0
    seq[0, ::chunk, 0] = torch.tensor(complexities, dtype=torch.float64)
    if angles is not None:
        seq[0, :, 1] = torch.tensor(angles, dtype=torch.float64).repeat_interleave(chunk)
    return seq


def pages_of(memory, seq, state=None):
    """The page that each chunk of a call is written to, from the steps: on the others they are zero."""
    _, _, (_, step) = memory(seq, state=state, return_surprises=True)
    step = step.unflatten(1, (memory.num_pages, memory.heads)).unflatten(-1, (-1, memory.store_chunk_size))
    written = (step != 0).any(dim=-1).all(dim=2)
    assert (written.sum(dim=1) == 1).all(), "one page for each chunk"
    return written.long().argmax(dim=1)


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def rates(memory, seq, state=None):
    """(as they would be without gates, as they are)."""
    span = memory.span(seq, 0)
    carry = memory.gating.start(GateCarry.of(state or NeuralMemState(0)), len(seq), seq.device)
    return memory.rates(span.tokens, span.chunk, False), memory.gated_rates(span, carry)


# the decay


def test_complexity_takes_its_share_of_the_decay():
    memory = told_memory(pages=1)
    seq = told([0.25, 0.0, 1.0, 0.5])
    before, gated = rates(memory, seq)
    scale = memory.symplectic_complexity_scale.item()
    factor = 1 - scale * float64([0.25, 0.0, 1.0, 0.5])
    assert 0 < scale < 1
    assert_close(1 - gated.rates.keep, (1 - before.keep) * factor, 1e-12)
    assert torch.equal(gated.rates.step, before.step)
    assert NeuralMemory(DIM, use_symplectic_gating=True).symplectic_complexity_scale.item() == 0.5


@pytest.mark.parametrize(("scale", "effect"), [(-3.0, 0.0), (2.0, 1.0)])
def test_the_scale_acts_within_0_and_1(scale, effect):
    memory = told_memory(pages=1)
    with torch.no_grad():
        memory.symplectic_complexity_scale.fill_(scale)
    before, gated = rates(memory, told([0.25, 1.0]))
    assert_close(1 - gated.rates.keep, (1 - before.keep) * (1 - effect * float64([0.25, 1.0])), 1e-12)


def test_a_scale_outside_finds_its_way_back():
    x = torch.tensor([-1.0, -1.0, 0.5, 0.5, 2.0, 2.0], requires_grad=True)
    slope = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    (between_0_and_1(x) * slope).sum().backward()
    assert x.grad.tolist() == [0.0, -1.0, 1.0, -1.0, 1.0, 0.0]


def test_the_score_of_a_chunk_is_its_largest_and_counts_the_token_before():
    """SymplecticGating on the whole sequence, chunk by chunk."""
    memory = randomise(NeuralMemory(DIM, 3, use_symplectic_gating=True).double(), 2, 0.2)
    seq = torch.randn(2, 12, DIM, dtype=torch.float64)
    _, gated = rates(memory, seq)
    wanted = memory.symplectic_gate(memory.store_norm(seq)).squeeze(-1).unflatten(1, (-1, 3))
    assert_close(gated.score.tokens, wanted, 1e-12)
    assert_close(gated.score.chunk, wanted.amax(dim=-1), 1e-12)


@pytest.mark.parametrize("window", [None, 4, 5])
def test_dmd_looks_back_over_a_window_that_ends_with_the_chunk(window):
    memory = randomise(NeuralMemory(DIM, 4, use_dmd_gating=True, dmd_window=window).double(), 2, 0.2)
    seq = torch.randn(2, 24, DIM, dtype=torch.float64)
    before, gated = rates(memory, seq)
    tokens = memory.store_norm(seq)
    wanted = torch.stack(
        [
            torch.stack([naive_dmd_error(row[max(0, end - (window or 16)) : end]) for end in range(4, 25, 4)])
            for row in tokens
        ]
    ).tanh()
    assert_close(gated.score.chunk, wanted, 1e-9)
    factor = 1 - memory.dmd_complexity_scale * wanted
    assert_close(1 - gated.rates.keep, (1 - before.keep) * factor, 1e-9)


def test_both_gates_share_score_and_scale():
    memory = NeuralMemory(
        DIM, 4, use_symplectic_gating=True, use_dmd_gating=True, combine_symplectic_and_dmd=True
    ).double()
    with torch.no_grad():
        memory.symplectic_complexity_scale.fill_(0.2)
        memory.dmd_complexity_scale.fill_(0.8)
    seq = torch.randn(1, 24, DIM, dtype=torch.float64)
    before, gated = rates(memory, seq)
    tokens = memory.store_norm(seq)
    twist = memory.symplectic_gate(tokens).squeeze(-1).unflatten(1, (-1, 4)).amax(dim=-1)
    error = torch.stack([naive_dmd_error(tokens[0, max(0, end - 16) : end]) for end in range(4, 25, 4)]).tanh()
    assert_close(1 - gated.rates.keep, (1 - before.keep) * (1 - 0.5 * (twist + error) / 2), 1e-9)


@pytest.mark.parametrize(
    ("options", "threshold"),
    [
        ({"use_symplectic_gating": True}, 0.5),
        ({"use_dmd_gating": True}, 0.4),
        ({"use_symplectic_gating": True, "symplectic_page_threshold": 0.1}, 0.1),
        ({"symplectic_page_threshold": 0.5}, 0.5),
    ],
)
def test_thresholds_by_default(options, threshold):
    assert NeuralMemory(DIM, **options).symplectic_page_threshold == threshold


# what the gate is given


def test_the_gate_sees_complete_chunks_behind_the_token_before():
    memory = told_memory(chunk=3, pages=1)
    seq = torch.randn(2, 14, DIM, dtype=torch.float64)
    state, at = None, 0
    for length in (2, 5, 1, 6):
        _, state = memory(seq[:, at : at + length], state=state)
        at += length
    seen = memory.symplectic_gate.seen
    assert [x.shape[1] for x in seen] == [6, 7]  # no call for tokens that wait; then one token before
    assert torch.equal(seen[0], seq[:, :6])
    assert torch.equal(seen[1], seq[:, 5:12])
    assert torch.equal(state.gate_tokens, seq[:, 11:12])


def test_a_gate_is_given_as_many_tokens_as_it_says():
    memory = told_memory(chunk=2, pages=1)
    memory.symplectic_gate.context = 5
    seq = torch.randn(1, 12, DIM, dtype=torch.float64)
    state = None
    for part in seq.split(2, dim=1):
        _, state = memory(part, state=state)
    assert [x.shape[1] for x in memory.symplectic_gate.seen] == [2, 4, 6, 7, 7, 7]
    memory.symplectic_gate.context = 0  # one that needs none may take its place at any time
    memory(seq[:, :2], state=state)
    assert memory.symplectic_gate.seen[-1].shape[1] == 2


def test_keyed_paging_asks_for_the_manifold_state_only_with_pages():
    class Plain(nn.Module):
        def forward(self, tokens):
            return tokens[..., :1].sigmoid()

    memory = NeuralMemory(DIM, use_symplectic_gating=True, manifold_state_keyed_paging=True)
    memory.symplectic_gate = Plain()
    memory(torch.randn(1, 4, DIM))
    memory = NeuralMemory(DIM, use_symplectic_gating=True, manifold_state_keyed_paging=True, num_pages=2)
    memory.symplectic_gate = Plain()
    with pytest.raises(TypeError, match="return_manifold_state"):
        memory(torch.randn(1, 4, DIM))


def test_a_budget_looks_back_over_a_window():
    def window(chunk, **kwargs):
        kwargs = {"quorum_mix": 0.5, "budget_topk_ratio": 0.2, **kwargs}
        return NeuralMemory(DIM, chunk, use_symplectic_gating=True, symplectic_gate_kwargs=kwargs).symplectic_gate

    assert window(4).budget_window == 64
    assert window(80).budget_window == 80
    assert window(4, budget_window=10).budget_window == 10


# kinetics


def test_kinetics_are_what_they_are_said_to_be():
    keep, step = torch.rand(5, 4, dtype=torch.float64), torch.rand(5, 4, 3, dtype=torch.float64) * 0.3
    got_keep, got_step = kinetics(keep, step, 0.7, 1e-6, 0.3)
    for i in range(5):
        for j in range(4):
            lr, decay = step[i, j].mean(), 1 - keep[i, j]
            r = lr / (lr + decay + 1e-6)
            torch.testing.assert_close(1 - got_keep[i, j], decay * (1 - 0.7 * r))
            torch.testing.assert_close(got_step[i, j], step[i, j] + 0.7 * (0.3 - step[i, j]) * r)


def test_kinetics_stay_within_bounds():
    """Steps of a user's own may be negative, or above the largest."""
    keep, step = torch.full((1, 1), 0.5), torch.tensor([[[-2.0, 4.0]]])
    keep, step = kinetics(keep, step, 1.0, 1e-6, 0.1)
    assert 0 <= keep.item() <= 1
    assert (step >= 0).all()


@pytest.mark.parametrize("gate", [{}, {"use_symplectic_gating": True}])
def test_kinetics_at_mix_0_change_nothing(gate):
    def build(**kinetics):
        torch.manual_seed(0)
        return NeuralMemory(DIM, 2, adaptive_step_transform=torch.tanh, **gate, **kinetics)

    seq = torch.randn(2, 9, DIM)
    plain, _ = build()(seq)
    assert torch.equal(build(kinetics_coupling=True, kinetics_mix=0.0)(seq)[0], plain)
    assert torch.equal(build(kinetics_coupling=False, kinetics_mix=0.5)(seq)[0], plain)
    assert not torch.equal(build(kinetics_coupling=True, kinetics_mix=0.5)(seq)[0], plain)


def test_kinetics_come_after_the_gate_and_before_mask_and_pages():
    options = {"kinetics_coupling": True, "kinetics_mix": 0.6, "default_step_transform_max_lr": 0.2}
    memory = told_memory(pages=2, symplectic_page_threshold=0.9, **options)
    seq = told([0.25, 0.5, 1.0, 0.5])
    before, gated = rates(memory, seq)
    scale = memory.symplectic_complexity_scale.item()
    decay = (1 - before.keep) * (1 - scale * float64([0.25, 0.5, 1.0, 0.5]))
    keep, step = kinetics(1 - decay, before.step, 0.6, 1e-6, 0.2)
    active = torch.tensor([[True, True, False, False], [False, False, True, True]])
    assert_close(gated.rates.keep, keep, 1e-12)
    assert torch.equal(gated.rates.active, active)
    assert_close(gated.rates.step, step * active.unsqueeze(-1), 1e-12)

    mask = torch.tensor([[True, False] * 4])
    _, _, (_, masked) = memory(seq, store_mask=mask, return_surprises=True)
    assert_close(masked, (step * active.unsqueeze(-1)).flatten(1).unsqueeze(0) * mask, 1e-12)


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


def test_page_switch_every_counts_windows_from_the_start():
    memory = told_memory(symplectic_page_threshold=0.3, page_switch_every=6)
    seq = told([0.1, 0.9, 0.9, 0.1, 0.2, 0.1, 0.9, 0.9, 0.9])
    wanted = [0, 1, 1, 1, 1, 1, 2, 2, 2]
    assert pages_of(memory, seq).tolist() == [wanted]
    state, got = None, []
    for part in seq.split([5, 1, 6, 2, 4], dim=1):
        if (part.shape[1] + (0 if state is None else state.cache_store_segment.shape[1])) >= 2:
            got += pages_of(memory, part, state)[0].tolist()
        _, state = memory(part, state=state)
    assert got == wanted


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
    [((None, None), (2, 3)), ((3, None), (3, 2)), ((None, 6), (1, 6)), ((6, 1), (6, 1))],
)
def test_pages_split_into_coarse_and_fine(given, split):
    memory = told_memory(pages=6, hierarchical_paging=True, coarse_pages=given[0], fine_pages=given[1])
    router = memory.gating.stages[-1].router
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

    class ByAngle:
        uses_phase = True

        def __call__(self, page, complexity, angle):
            return torch.where(angle > 0, 2, 1)

    memory = told_memory(pages=3, phase=True, page_router=ByAngle(), page_switch_every=2)
    assert pages_of(memory, told([0.9] * 3, [1.0, -1.0, 1.0])).tolist() == [[2, 1, 2]]


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
    assert off.gating.stages == ()
    assert off.symplectic_gate is None
    assert off.page_switch_events is None
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
    torch.manual_seed(0)
    memory = NeuralMemory(
        DIM, 2, use_symplectic_gating=True, num_pages=2, page_threshold_quantile=0.5, page_switch_every=2
    )
    seq = torch.randn(1, 2, DIM).repeat(1, 30, 1)
    _, state = memory(seq)
    for token in seq.unbind(dim=1):
        _, state = memory(token, state=state)
    assert int(memory.page_switch_events) == 0


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
    assert state.gate_tokens.requires_grad is False or state.gate_tokens.grad_fn is not None
    cut = mem_state_detach(state)
    assert not any(value.requires_grad for value in GateCarry.of(cut) if value is not None)
    again = NeuralMemState.from_tensordict(cut.to_tensordict(3))
    for carried in (state, cut, again, copy.deepcopy(cut), pickle.loads(pickle.dumps(cut))):
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


@each
def test_compiles_without_a_graph_break(options):
    memory, seq = used_memory(**options), torch.randn(2, 30, DIM)

    def decide(seq):
        carry = memory.gating.start(GateCarry(), len(seq), seq.device)
        gated = memory.gated_rates(memory.span(seq, 0), carry)
        memory.gating.count(memory, gated)
        return gated.rates.keep, gated.rates.step, gated.carry, gated.choice.page

    wanted, counted = decide(seq), int(memory.page_switch_events)
    assert counted > 0
    got = torch.compile(decide, backend="aot_eager", fullgraph=True)(seq)
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
    for name in ("symplectic_complexity_scale", "dmd_complexity_scale", "symplectic_gate.to_phase.weight"):
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
        ({"page_switch_every": 3}, "page_switch_every"),
        ({"page_switch_every": 0}, "page_switch_every"),
        ({"dmd_window": 1}, "dmd_window"),
        ({"page_threshold_quantile": 2.0}, "page_threshold_quantile"),
        ({"page_threshold_window": 0}, "page_threshold_window"),
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
    with pytest.raises(ValueError, match=f"^{name}: got .* takes "):
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
    with pytest.raises(ValueError, match="^symplectic_gate: got "):
        memory(torch.randn(1, 4, DIM))


def test_a_gate_over_the_whole_sequence_is_refused():
    whole = SymplecticGating(DIM, quorum_mix=0.5, budget_topk_ratio=0.5)
    with pytest.raises(ValueError, match=r"^symplectic_gate.context: got None"):
        NeuralMemory(DIM, symplectic_gate=whole, **GATE)
    memory = NeuralMemory(DIM, **GATE)
    memory.symplectic_gate = whole
    with pytest.raises(ValueError, match=r"^symplectic_gate.context: got None"):
        memory(torch.randn(1, 4, DIM))


@pytest.mark.parametrize("field", ["gate_tokens", "active_page_indices", "last_switch", "recent_complexity"])
def test_a_state_of_another_shape_is_named(field):
    memory = used_memory(page_threshold_quantile=0.5)
    _, state = memory(torch.randn(2, 30, DIM))
    state = state._replace(**{field: getattr(state, field)[:1]})
    with pytest.raises(ValueError, match=f"^state.{field}: got "):
        memory(torch.randn(2, 4, DIM), state=state)
