"""Tasks: what they ask can be answered from what was written, and from nothing else; constants know their level."""

import math

import pytest
import torch
from harness.arms import Arm, build
from harness.task import Setting, generator
from tasks.curves import Follow, Recovery, angle_between, curve, planes
from tasks.detect import Detect, area
from tasks.grammar import Grammar
from tasks.interference import Interference
from tasks.interleaving import Interleaving
from tasks.motifs import MultiMotif
from tasks.needle import Needle
from tasks.pairs import chosen_right, relative_error, unit_rows
from tasks.text import Text
from torch import nn

from titans_pytorch import NeuralMemory

TASKS = [
    Interference(dim=16, pairs=4, chunk_size=4, batch_size=4),
    Needle(dim=16, needles=3, length=8, chunk_size=4, batch_size=4),
    Follow(dim=8, length=16, chunk_size=4, batch_size=4),
    Recovery(dim=8, length=16, chunk_size=4, batch_size=4),
    Grammar(dim=16, length=24, batch_size=4),
    MultiMotif(dim=8, length=24, segments=6, chunk_size=4, batch_size=4),
    Interleaving(dim=16, needles=3, length=8, chunk_size=4, batch_size=4, before=4),
]
PAGED = Arm("a", {"use_symplectic_gating": True, "num_pages": 2}, switch_rate=0.5)


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_every_task_trains_freezes_and_scores(task):
    out = task.run(PAGED, 0, Setting(steps=1, test_batches=1))
    names = {m.name for m in task.metrics}
    assert names <= set(out["metrics"])
    assert all(math.isfinite(v) for v in out["metrics"].values())
    assert out["pages"]["opportunities"] > 0
    train, test = (list(task.batches(0, part, 4)) for part in ("train", "test"))
    constant = task.constant(train, test)
    assert names <= set(constant)
    assert 0.7 < constant[task.metrics[0].name] < 1.3  # errors are relative: 1 for nothing known


class Table(nn.Module):
    """A memory that knows all it has read: answers with the value beside the nearest key, of the last that has it.
    shared: one table; else one for each context (a sequence's first tokens)."""

    def __init__(self, dim, context, shared):
        super().__init__()
        self.half, self.context, self.shared = dim // 2, context, shared

    def forward(self, tokens, state=None, store_mask=None):
        table = dict(state or {})
        out = torch.zeros_like(tokens)
        for b in range(len(tokens)):
            at = 0 if self.shared else hash(tuple(tokens[b, : self.context].flatten().tolist()))
            for i, token in enumerate(tokens[b]):
                if store_mask is None or store_mask[b, i]:
                    table[b, at, tuple(token[: self.half].tolist())] = token[self.half :]
                key = (b, at, tuple(token[: self.half].tolist()))
                out[b, i, self.half :] = table.get(key, torch.zeros(self.half))
        return out, table


def test_interference_is_in_the_task_and_contexts_solve_it():
    task = TASKS[0]
    (episode,) = task.batches(3, "test", 1)
    one, apart = (task.scores(Table(task.dim, task.context, shared), episode) for shared in (True, False))
    assert float(one["error_a_before"]) == float(one["error_b"]) == 0.0
    assert float(one["error_a_after"]) == pytest.approx(2.0, abs=0.4)  # B's values, as far away as strangers
    assert [float(apart[k]) for k in ("error_a_before", "error_a_after", "error_b", "forgetting")] == [0.0] * 4
    assert float(apart["chosen_a_after"]) == 1.0
    again = list(task.batches(3, "test", 1))[0]
    assert all(torch.equal(a, b) for a, b in zip(episode, again, strict=True))
    other = list(task.batches(3, "train", 1))[0]
    assert torch.equal(episode.context, other.context)  # contexts are the seed's
    assert not torch.equal(episode.keys, other.keys)


def test_shuffled_labels_show_nothing():
    """Asked for the values of another row, even a perfect memory does no better than chance."""
    task = Interference(dim=16, pairs=4, chunk_size=4, batch_size=64)
    (episode,) = task.batches(3, "test", 1)
    errors, answers = task.errors(Table(task.dim, task.context, False), episode)
    others = episode.a.roll(1, dims=0)
    assert relative_error(answers, others).item() == pytest.approx(2.0, abs=0.2)
    assert chosen_right(answers, others).item() == pytest.approx(0.25, abs=0.09)
    assert float(errors["error_a_after"]) == 0.0


def test_needles_are_stored_before_they_are_asked_for():
    task = TASKS[1]
    (hay,) = task.batches(0, "test", 1)
    assert float(task.scores(Table(task.dim, 1, True), hay)["error"]) == 0.0
    memory = build(task, Arm("a"), 0)
    base = task.answers(memory, hay)
    changed = task.answers(memory, hay._replace(values=hay.values + 1.0))
    assert not torch.allclose(base[0], changed[0])
    later = task.answers(memory, hay._replace(hay=hay.hay + 1.0))
    assert torch.equal(base[0], later[0])
    assert not torch.allclose(base[1], later[1])


def test_a_background_is_read_before_and_after_the_needles():
    task = TASKS[-1]
    (data,) = task.batches(0, "test", 1)
    assert data.hay.shape == (4, 12, 16)
    assert float(task.scores(Table(task.dim, 1, True), data)["error"]) == 0.0
    memory = build(task, Arm("a"), 0)
    base = task.answers(memory, data)
    late, early = (data._replace(hay=data.hay + (torch.arange(12) // 4 == part)[:, None]) for part in (2, 0))
    late, early = task.answers(memory, late), task.answers(memory, early)
    assert torch.equal(base[0], late[0])
    assert not torch.allclose(base[1], late[1])
    assert not torch.allclose(base[0], early[0])


def test_areas_of_known_scores():
    low, high = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 3.0])
    assert area(low, high) == pytest.approx((1 + 0.5 + 0 + 3) / 6)
    assert area(low, low + 5) == 1.0
    assert area(low + 5, low) == 0.0


class LastJump(nn.Module):
    """Knows the speeds of one mode: how far from linear its rows are."""

    def forward(self, seq):
        ahead, here, back = seq[:, 2:], seq[:, 1:-1], seq[:, :-2]
        # x_{t+1} + x_{t-1} = 2 cos(speed) x_t
        double = ((ahead + back) * here).sum(dim=(1, 2)) / here.square().sum(dim=(1, 2))
        return (ahead + back - double[:, None, None] * here).square().mean(dim=(1, 2))


@pytest.mark.parametrize("kind", ["disorder", "change"])
def test_order_can_be_told_and_the_control_shows_nothing(kind):
    task = Detect(kind, noise=0.0, dim=8, length=16, modes=1, rows=200)
    (batch,) = task.batches(0, "test", 1)
    assert batch["ordered"].square().mean().item() == pytest.approx(1.0, abs=1e-3)
    model = LastJump()
    model.shuffled = False
    told = task.scores(model, batch)
    assert told["score_linear"].item() < 1e-9
    assert told["area"] > 0.99
    model.shuffled = True
    assert task.scores(model, batch)["area"] == pytest.approx(0.5, abs=0.1)


def test_errors_of_known_answers():
    values = unit_rows(2, 5, 8, generator=generator("x"))
    assert values.square().mean().item() == pytest.approx(1.0)
    assert relative_error(torch.zeros_like(values), values).item() == pytest.approx(1.0)
    assert relative_error(values, values).item() == 0.0
    assert chosen_right(values + 0.01, values).item() == 1.0
    assert chosen_right(values.flip(1), values).item() == pytest.approx(0.2)


def test_curves_turn_as_fast_as_they_say():
    plane = planes(3, 8, generator("p"))
    assert torch.allclose(plane.transpose(1, 2) @ plane, torch.eye(3).expand(3, 3, 3), atol=1e-5)
    turned = curve(plane, torch.zeros(3, 1), torch.full((3, 1), 0.1), 20, rise=0.0)
    assert torch.allclose(angle_between(turned[:, 1:], turned[:, :-1], plane), torch.tensor(0.2 * math.pi), atol=1e-3)
    assert turned.square().mean().item() == pytest.approx(1.0, abs=1e-4)


def test_a_closing_asks_for_what_it_closes():
    task = Grammar(dim=16, length=40, batch_size=8, kinds=2, depth=3)
    (batch,) = task.batches(0, "test", 1)
    keys, k = task.world(0), 8
    for row in range(8):
        stack = []
        for i in range(task.length):
            token = batch.tokens[row, i]
            if batch.opening[row, i]:
                stack.append((i, token))
                continue
            at, opened = stack.pop()
            assert torch.equal(token[:k], opened[:k])
            assert not token[k:].any()
            assert bool(batch.asked[row, i]) == (at // task.chunk_size < i // task.chunk_size)
            if batch.asked[row, i]:
                assert torch.equal(batch.answers[row, i], opened[k:])
                between = [j for j in range(at + 1, i) if batch.opening[row, j]]
                covered = any(torch.equal(batch.tokens[row, j, :k], token[:k]) for j in between)
                assert bool(batch.deep[row, i]) == covered
        assert len(stack) <= task.depth
    assert batch.deep.any()
    assert len(keys) == 2


def test_motifs_come_back_and_the_last_third_is_held_out():
    task = MultiMotif(dim=8, length=48, segments=4, chunk_size=8, batch_size=2, noise=0.0, boundary=3)
    (batch,) = task.batches(0, "test", 1)
    first, second, third = batch.clean[:, :12], batch.clean[:, 12:24], batch.clean[:, 24:36]
    rank = [torch.linalg.matrix_rank(x[0], rtol=1e-4).item() for x in (first, torch.cat((first, third), 1), second)]
    assert rank == [2, 2, 2]  # in the plane of the first again
    assert torch.linalg.matrix_rank(torch.cat((first, second), 1)[0], rtol=1e-4) == 4
    errors = torch.zeros(48)
    errors[-16:] = 1.0
    assert task.scored(errors, batch) == {"mse_total": 1.0, "mse_boundary": 1.0}
    assert batch.boundary.nonzero().flatten().tolist() == [12, 13, 14, 24, 25, 26, 36, 37, 38]


def test_text_is_split_and_the_constant_is_the_share_of_bytes(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"ab" * 5000 + b"c" * 1200)
    task = Text(str(path), str(tmp_path), dim=16, depth=1, length=32, batch_size=2, memory_dim=8)
    train, held_out = task.world(0)
    assert (len(train), len(held_out)) == (10080, 1120)
    out = task.run(PAGED, 0, Setting(steps=1, test_batches=1))
    assert 5 < out["metrics"]["bits_per_byte"] < 14
    assert out["pages"]["opportunities"] > 0
    constant = task.constant([], list(task.batches(0, "test", 1)))
    share = 81 / (10080 + 256)
    assert constant["bits_per_byte"] == pytest.approx(-math.log2(share))
    plain = build(task, Arm("p", {"heads": 2}, like=PAGED), 0)
    assert any(isinstance(m, NeuralMemory) and hasattr(m, "matched") for m in plain.modules())
    assert plain(torch.zeros(1, 33, dtype=torch.long), return_loss=True).isfinite()
    with pytest.raises(ValueError, match="does not exist"):
        Text(str(tmp_path / "none"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Interference(pairs=5),
        lambda: Needle(length=9),
        lambda: Interleaving(before=9),
        lambda: Follow(dim=2),
        lambda: MultiMotif(length=50),
        lambda: Detect("x"),
    ],
)
def test_settings_that_do_not_fit_are_named(make):
    with pytest.raises(ValueError, match="must be .*, got "):
        make()
