"""Searches: on other seeds than the reported ones, arms that do the same tried once, random search on the same budget;
and the score over two tasks."""

import argparse
import random
import statistics
from types import SimpleNamespace

import pytest
from benchmark_codebook_sweep import arm_of as codebook_arm
from benchmark_codebook_sweep import grid, sizes
from benchmark_mutation_selection import evolve
from benchmark_mutation_transfer import champion
from benchmark_switch_budget_sweep import ratios
from fake_task import Planted
from gate_genes import BY_HAND, GENES, arm_of, drawn, mutated
from harness.arms import Arm
from harness.compare import between, versus
from harness.search import Search, random_search
from harness.session import Session
from harness.task import Setting
from tasks import transfer


def search_over(values, seeds=2):
    """Of one number x; the error is its distance from 3, and some noise of the seed."""
    session = Session(range(5), Setting(1), progress=False)

    def value(params, outcomes):
        return outcomes["planted"]["metrics"]["error"] + 10 * abs(params["x"] - 3)

    def make(params):
        return Arm("a", {"heads": 1 + params["x"] // 2})

    search = Search(session, [Planted(shuffled=True)], session.selection_seeds(seeds), make, value)
    for x in values:
        search.trial({"x": x})
    return search


def test_a_search_finds_what_is_planted_on_other_seeds():
    search = search_over([0, 2, 4, 8])
    assert search.best.params == {"x": 2} or search.best.params == {"x": 4}
    assert not set(search.seeds) & set(search.session.seeds)
    record = search.record()
    assert record["budget"] == 4
    assert [t["score"] for t in record["trials"]] == sorted(t["score"] for t in record["trials"])
    assert record["trials"][0]["stats"]["planted"]["error"] > 0


def test_arms_that_do_the_same_are_tried_once():
    assert search_over([0, 1, 4, 5]).budget == 2


def test_random_search_has_the_same_budget_and_ends():
    search = search_over([0, 2, 4])
    chance = random_search(search.fresh(), lambda source: {"x": source.randint(0, 99)}, search.budget, 0)
    assert (chance.budget, search.budget) == (3, 3)
    again = random_search(search.fresh(), lambda source: {"x": source.randint(0, 99)}, search.budget, 0)
    assert again.record() == chance.record()
    assert random_search(search.fresh(), lambda source: {"x": 1}, 5, 0).budget == 1


def test_without_a_mix_all_codebooks_are_one_arm():
    args = argparse.Namespace(
        dim=16, pages=2, switch_rate=0.5, mixes=[0.0, 0.5], sizes=sizes("8,2"), topks=sizes("none,4")
    )
    cells = grid(args)
    assert len(cells) == 2 * 3  # no top 4 of 2
    found = {str(codebook_arm(args, cell).what()) for cell in cells}
    assert len(found) == 1 + 3


def test_genes():
    source = random.Random(0)
    candidates = [drawn(source) for _ in range(200)]
    assert all({c[gene] for c in candidates} == set(values) for gene, values in GENES.items())
    assert mutated(BY_HAND, 0.0, source) == BY_HAND
    changed = statistics.fmean(mutated(c, 1.0, source) != c for c in candidates)
    assert changed > 0.9
    quiet = {**BY_HAND, "quorum_mix": 0.0, "hierarchical": False}
    same = [arm_of({**quiet, "quorum_window": w}, "a", 16, 2, 4, 0.5).what() for w in (3, 7)]
    assert same[0] == same[1]
    assert arm_of(BY_HAND, "a", 16, 2, 5, 0.5).memory["num_pages"] == 6


def test_mutation_keeps_what_is_best():
    session = Session(range(2), Setting(1), progress=False)

    def value(params, outcomes):
        return sum(params[gene] != BY_HAND[gene] for gene in GENES)

    def make(params):
        return Arm("a", {gene: str(v) for gene, v in params.items()})

    search = Search(session, [Planted(shuffled=True)], [1], make, value)
    args = SimpleNamespace(population=6, generations=5, elites=2, mutation_prob=0.3)
    history = evolve(search, args, random.Random(0))
    scores = [h["best"]["score"] for h in history]
    assert scores == [0.0] * 5  # the one made by hand is the best there is, and stays
    assert history[0]["tried"] <= 6 < history[-1]["tried"] <= 6 + 4 * 4
    assert search.best.params == BY_HAND


# arm against arm, and the score


def record_of(task, arms):
    metrics = [{"name": m, "better": "lower", "judged": False} for m in next(iter(arms.values()))]

    def stated(values):
        return {"values": values, "mean": statistics.fmean(values)}

    found = {
        arm: {"metrics": {m: stated(v) for m, v in got.items()}, "controls": [], "about": ""}
        for arm, got in arms.items()
    }
    return {"metrics": metrics, "refused": None, "arms": found}


def two_tasks(shift, price=0.0):
    noise = [0.0, 0.1, 0.3, 0.2, 0.05]

    def values(level, own):
        return [level + x + 0.001 * i * own for i, x in enumerate(noise)]

    names = {"clean_mse_post": 1.0, "phase_err_post": 0.6}
    long = {a: {m: values(v - shift * i, i) for m, v in names.items()} for i, a in enumerate(("a", "b"))}
    short = {
        a: {"error_a_after": values(2.0 - shift * i, i), "error_b": values(2.0 + price * i, i)}
        for i, a in enumerate(("a", "b"))
    }
    tasks = {transfer.LONG: record_of(transfer.LONG, long), transfer.INTERFERENCE: record_of("interference", short)}
    return {"tasks": tasks, "run": {"seeds": list(range(5))}, "versus": [], "timing": {"arms": {}}}


def test_the_transfer_score():
    result = two_tasks(0.1, price=-0.1)
    assert transfer.scores_of(result, "a")[0] == pytest.approx(1.0 + 0.5 * 0.6 + 2.0)
    assert transfer.winner(result, ["b", "a"]) == "b"
    assert transfer.score_line(result, "b", "a")["mean"] == pytest.approx(0.25, abs=0.01)
    assert transfer.percent(result, "b", "a")["interference_post_a_pct"] == pytest.approx(100 * 0.098 / 2.13, rel=0.01)
    dear = two_tasks(0.1, price=0.5)  # A is kept, B pays
    assert transfer.score_line(dear, "b", "a")["verdict"] == "better than a, but error_b is worse"
    assert transfer.winner(dear, ["b", "a"]) is None
    flat = two_tasks(0.0)
    assert transfer.winner(flat, ["a", "b"]) == "a"  # by a hair, but in every seed
    flat["tasks"][transfer.INTERFERENCE]["refused"] = "too easy"
    assert transfer.winner(flat, ["a", "b"]) is None


def test_arm_against_arm():
    assert between("x", "a", "b", [1.0, 1.1, 0.9], [2.0, 2.3, 2.1])["verdict"] == "better than b"
    assert between("x", "a", "b", [1.0, 1.1, 0.9], [2.0, 2.3, 2.1], "higher")["verdict"] == "worse than b"
    assert between("x", "a", "b", [1.0, 2.0, 3.0], [3.0, 1.0, 2.0])["verdict"] == "no difference found"
    task = record_of("t", {"a": {"error": [1.0, 1.1]}, "b": {"error": [3.0, 3.0]}})
    (line,) = versus("t", task, [("a", "b")])
    assert (line["what"], line["mean"]) == ("t, error", pytest.approx(1.95))
    assert versus("t", {**task, "refused": "too easy"}, [("a", "b")]) == []
    task = record_of(
        "t", {"a": {"kept": [1.0, 1.1], "paid": [2.0, 2.1]}, "b": {"kept": [3.0, 3.0], "paid": [1.0, 1.0]}}
    )
    task["metrics"][0]["beside"] = "paid"
    assert versus("t", task, [("a", "b")])[0]["verdict"] == "better than b, but paid is worse"


def test_steps_of_a_task():
    common = Setting(80, test_batches=4)
    given = {"long_warmup_steps": None, "long_perturb_steps": None, "long_recovery_steps": None}
    args = SimpleNamespace(**given, interference_steps=None, interference_eval_iters=None)
    assert set(transfer.settings(args, common).values()) == {common}
    args = SimpleNamespace(
        long_warmup_steps=5,
        long_perturb_steps=3,
        long_recovery_steps=None,
        interference_steps=7,
        interference_eval_iters=2,
    )
    found = transfer.settings(args, common)
    assert found[transfer.LONG] == Setting(8, test_batches=4)
    assert found[transfer.INTERFERENCE] == Setting(7, test_batches=2)


def test_flags_of_searches(tmp_path):
    assert ratios("0.3,none,0.1") == [None, 0.1, 0.3]
    assert sizes("none,4,4") == [None, 4]
    for wrong in ("0", "x", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="must be "):
            sizes(wrong)
    path = tmp_path / "r.json"
    for content in ("{", "{}", '{"best": {"candidate": {"phase_mix": 0.5}}}'):
        path.write_text(content)
        with pytest.raises(argparse.ArgumentTypeError, match=r"r\.json"):
            champion(str(path))
    with pytest.raises(argparse.ArgumentTypeError, match="No such file"):
        champion(str(tmp_path / "none.json"))
