"""Every task: rows that hang on nothing but seed, position and length; a solution that is right; guesses at chance."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from titans_pytorch.tasks.registry import TASKS, build_task
from titans_pytorch.tasks.task import IGNORE

SETTINGS = {
    "copy": ("copy", {"length": 40}),
    "copy of distinct tokens": ("copy", {"length": 30, "distinct": True, "payload": 6, "symbols": 8}),
    "copy in the next segment": ("copy", {"length": 64, "segment_len": 16}),
    "patterns": ("patterns", {"length": 50}),
    "needle: position": ("needle", {"length": 60, "kind": "position"}),
    "needle: passkey": ("needle", {"length": 40, "kind": "passkey", "digits": 3}),
    "needle: number": ("needle", {"length": 40, "kind": "number", "digits": 2, "gap": 20}),
    "recall": ("recall", {"length": 40}),
    "variables": ("variables", {"length": 60, "hops": 2, "queries": 2}),
    "text passkey": ("text_passkey", {"length": 180}),
}


@pytest.fixture(scope="module")
def make(text_file, tmp_path_factory):
    def built(which, **changes):
        name, settings = SETTINGS[which]
        if name == "text_passkey":
            settings = {**settings, "data": str(text_file), "data_dir": str(tmp_path_factory.mktemp("texts"))}
        return build_task(name, {**settings, **changes})

    return built


def test_every_task_is_here():
    assert {name for name, _ in SETTINGS.values()} == set(TASKS)


@pytest.mark.parametrize("which", SETTINGS)
def test_the_reference_is_always_right(make, which):
    task = make(which)
    for length in (task.shortest, task.length, 2 * task.length + 1):
        score = task.score(task.reference, sequences=30, length=length, batch_size=7)
        assert (score.accuracy, score.exact, score.rows, score.length) == (1.0, 1.0, 30, length)
        assert score.answers >= 30


@pytest.mark.parametrize("which", SETTINGS)
def test_the_reference_looks_only_back(make, which):
    """What is asked at a position can be answered from the tokens up to it."""
    task = make(which)
    rows = task.batch(0, 3)
    for ids, targets in zip(rows.ids.tolist(), rows.targets.tolist(), strict=True):
        for position, token in task.solve(ids).items():
            assert targets[position] == token
            later = ids[: position + 1] + [ids[position]] * (len(ids) - position - 1)
            if task.name not in ("variables", "patterns"):  # whose solutions need whole statements and rounds
                assert task.solve(later)[position] == token


@pytest.mark.parametrize("which", SETTINGS)
def test_guesses_are_right_by_chance(make, which):
    task = make(which)
    score = task.score(task.guesser(1), sequences=400)
    uniform = 1 / len(task.answer_ids)
    spread = (uniform / score.answers) ** 0.5
    assert score.accuracy == pytest.approx(uniform, abs=4 * spread)
    assert task.chance >= uniform
    assert task.guesser(1)(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, task.vocab_size)


@pytest.mark.parametrize("which", SETTINGS)
def test_rows_hang_on_seed_position_and_length_alone(make, which):
    task, twin, other = make(which), make(which), make(which, seed=1)
    rows = task.batch(5, 6)
    for ours, theirs in zip(rows, twin.batch(5, 6), strict=True):
        assert torch.equal(ours, theirs)
    for ours, first, second in zip(rows, twin.batch(5, 2), twin.batch(7, 4), strict=True):
        assert torch.equal(ours, torch.cat((first, second)))
    assert not torch.equal(rows.ids, other.batch(5, 6).ids)
    assert not torch.equal(rows.ids, task.batch(5, 6, held_out=True).ids)
    assert torch.equal(rows.ids, replace(task, length=task.length + 1).batch(5, 6, length=task.length).ids)


@pytest.mark.parametrize("which", SETTINGS)
def test_tokens_and_targets_are_in_range(make, which):
    task = make(which)
    for length in (task.shortest, task.length):
        rows = task.batch(0, 20, length)
        asked = rows.targets[rows.targets != IGNORE]
        assert rows.ids.shape == rows.targets.shape == (20, length)
        assert set(rows.ids.unique().tolist()) <= set(range(task.vocab_size))
        assert set(asked.tolist()) <= set(task.answer_ids)
        # within an answer of several tokens each is told before the next is asked
        told = (rows.targets[:, :-1] != IGNORE) & (rows.targets[:, 1:] != IGNORE)
        assert torch.equal(rows.targets[:, :-1][told], rows.ids[:, 1:][told])


def test_known_rows():
    """Rows worked out by hand."""
    copy = build_task("copy", {"payload": 3, "symbols": 4, "length": 12, "segment_len": 4})
    rows = copy.batch(0, 1)
    a, b, c = rows.ids[0, :3].tolist()
    assert rows.ids[0].tolist() == [a, b, c, 0, 0, 0, 0, 0, 1, a, b, 0]
    assert rows.targets[0].tolist() == [IGNORE] * 8 + [a, b, c, IGNORE]
    assert build_task("recall", {"pairs": 2, "queries": 1, "length": 7}).solve([3, 40, 5, 41, 0, 5, 41]) == {5: 41}
    variables = build_task("variables", {"length": 30, "chains": 1, "names": 4, "values": 3})
    assert variables.solve([0, 1, 5, 9, 2, 6, 5, 0, 3, 6, 9]) == {9: 9}
    needle = build_task("needle", {"kind": "position", "length": 40, "sections": 2, "hay": 2})
    assert needle.solve([12, 14, 15, 13, 14, 0, 14, 1]) == {7: 13}
    patterns = build_task("patterns", {"length": 20})
    assert patterns.solve([0, 4, 5, 0, 4, 5, 0]) == {3: 4, 4: 5, 6: 4}


def test_places():
    """A copy begins a segment, at the same place as the payload; a needle keeps its distance."""
    copy = build_task("copy", {"length": 100, "segment_len": 16})
    assert [copy.mark_at(length) for length in (24, 39, 40, 100)] == [16, 16, 32, 80]
    needle = build_task("needle", {"length": 40, "gap": 25})
    ids = needle.batch(0, 200).ids
    at = (ids == 0).nonzero()[:, 1]
    assert at.min() == 0
    assert at.max() == 40 - 1 - 25 - 2
    sections = build_task("needle", {"kind": "position", "length": 100, "sections": 4})
    answers = sections.batch(0, 200).targets[:, -1]
    assert set(answers.tolist()) == set(sections.answer_ids)


def test_chance_of_distinct_tokens():
    """One who only rules out what the copy has shown already reaches the stated level."""
    task = build_task("copy", {"payload": 4, "symbols": 5, "distinct": True, "length": 12})
    rng = torch.Generator().manual_seed(0)

    def ruling_out(ids):
        logits = torch.rand(*ids.shape, task.vocab_size, generator=rng)
        for row, tokens in enumerate(ids.tolist()):
            for at in range(8, 12):
                logits[row, at, [0, 1, *tokens[9 : at + 1]]] = -1.0
        return logits

    assert task.chance == pytest.approx((1 / 5 + 1 / 4 + 1 / 3 + 1 / 2) / 4)
    assert task.score(ruling_out, sequences=1000).accuracy == pytest.approx(task.chance, abs=0.04)


def test_a_score_counts_answers_and_rows():
    """Right at the first of two answers only."""
    task = build_task("needle", {"length": 20, "digits": 2})

    class Half(nn.Module):
        def forward(self, ids):
            assert not self.training
            logits = task.reference(ids)
            logits[:, -1] = 0.0
            logits[:, -1, 0] = 1.0
            return logits

    model = Half()
    score = task.score(model, sequences=10, batch_size=3)
    assert (score.accuracy, score.exact, score.answers) == (0.5, 0.0, 20)
    v = task.vocab_size
    right, wrong = (torch.zeros(v).index_fill(0, torch.tensor(i), 1.0).log_softmax(0) for i in (0, 1))
    assert score.loss == pytest.approx(float(-(right[0] + wrong[0]) / 2), rel=1e-6)
    assert model.training


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("cpoy", {}, "unknown task cpoy; the nearest is copy"),
        ("copy", {"paylod": 3}, "unknown setting paylod of the copy task; the nearest is payload"),
        ("copy", {"length": 10}, "length must be at least 16 for this copy task, got 10"),
        (
            "copy",
            {"payload": 5, "symbols": 4, "distinct": True},
            "payload must be at most symbols = 4 distinct tokens, got 5",
        ),
        ("copy", {"segment_len": 4}, "segment_len must be at least the payload, 8, got 4"),
        ("patterns", {"longest_period": 2}, "longest_period must be at least shortest_period = 6, got 2"),
        ("needle", {"kind": "colour"}, "kind must be one of position, passkey, number, got 'colour'"),
        ("needle", {"gap": -1}, "gap must be an integer of at least 0, got -1"),
        ("recall", {"pairs": 40}, "pairs must be at most keys = 32, got 40"),
        ("recall", {"queries": 9}, "queries must be at most pairs = 8, got 9"),
        ("variables", {"hops": 9}, "names must be at least chains * (hops + 1) = 30, got 16"),
        ("variables", {"queries": 4}, "queries must be at most chains = 3, got 4"),
    ],
)
def test_mistakes(name, settings, message):
    with pytest.raises(ValueError) as error:
        build_task(name, settings)
    assert message in str(error.value)


def test_too_short_a_row():
    with pytest.raises(ValueError, match="length must be at least 16.*, got 15"):
        build_task("copy").score(lambda ids: ids, length=15)
