"""A planted effect is found, its absence too; runs continue; files refuse what does not fit; the same seed, the same
numbers."""

import csv
import json
import math
import re
from dataclasses import dataclass

import pytest
import torch
from fake_task import Planted
from harness.arms import Arm, build, controls_of, match_parameters, never, parameters, plain, state_size
from harness.compare import arm_record, improvement_pct, pooled
from harness.csvfile import COLUMNS, OtherSchema, append_rows, check_columns
from harness.program import Benchmark, Plan
from harness.session import Session
from harness.store import Finished
from harness.switches import Switches, heard, set_thresholds, warning, watched
from harness.task import Metric, Setting
from tasks.interference import Interference

from titans_pytorch import NeuralMemory

PAGED = Arm("paged", {"use_symplectic_gating": True, "num_pages": 2, "symplectic_page_threshold": 0.1})
SETTING = Setting(steps=1, test_batches=1)


def judged(task, seeds=5, arm=PAGED):
    record = Session(range(seeds), SETTING, progress=False).compare(task, [arm])
    return record, record["arms"][arm.name]["gains"]


def test_a_planted_effect_is_found():
    record, gains = judged(Planted())
    assert gains["error"]["verdict"] == "better than paged/plain and paged/never"
    assert gains["error"]["mean"] == pytest.approx(1.0, abs=0.3)
    assert gains["recall"]["mean"] == pytest.approx(gains["error"]["mean"])  # higher is better there
    assert gains["forgetting"]["verdict"] is None  # not judged
    assert record["refused"] is None
    assert judged(Planted(gain=-1.0))[1]["error"]["verdict"].startswith("worse than paged/")


def test_where_nothing_helps_nothing_is_found():
    found = [judged(Planted(shuffled=True, gain=g))[1]["error"]["verdict"] for g in (1.0, 5.0)]
    assert found == ["no difference found"] * 2
    assert judged(Planted(), seeds=1)[1]["error"]["verdict"] == "refused"  # one seed shows no forgetting


def test_switching_made_impossible_shows_nothing():
    stuck = never(PAGED)
    arm = Arm("stuck", stuck.memory)
    task = Interference(dim=8, pairs=4, chunk_size=4, batch_size=2)
    record, gains = judged(task, seeds=2, arm=arm)
    each = gains["error_a_after"]["each"]["stuck/never"]
    assert (each["mean"], each["low"], each["high"]) == (0.0, 0.0, 0.0)
    assert "better" not in gains["error_a_after"]["verdict"]
    assert record["arms"]["stuck"]["pages"]["switch_rate"] == 0.0
    assert any("never turned" in line for line in record["warnings"])


def test_a_task_that_a_naive_memory_does_not_forget_is_refused():
    record, gains = judged(Planted(forgets=0.0))
    assert record["refused"].startswith("too easy: a plain memory of one head is not seen to forget (forgetting ")
    assert gains["error"]["verdict"] == "refused"


@pytest.mark.parametrize(
    ("how", "seeds", "reason"),
    [
        ({"forgets": 0.0, "level": 2.0}, 5, "has learned nothing: ... better than the same answer always (error ...)"),
        ({"forgets": 0.0, "level": 2.0}, 1, "has learned nothing: ... better than the same answer always (error ...)"),
        ({"forgets": math.nan}, 5, "has diverged: a plain memory of one head gives numbers that are not finite"),
        ({}, 1, "too few seeds: one does not show whether a plain memory of one head forgets (forgetting ...)"),
    ],
)
def test_the_reason_of_a_refusal(how, seeds, reason):
    record, gains = judged(Planted(**how), seeds=seeds)
    assert re.fullmatch(re.escape(reason).replace(r"\.\.\.", ".*"), record["refused"])
    assert gains["error"]["verdict"] == "refused"


def test_controls_match():
    task = Interference(dim=16, pairs=4, chunk_size=4)
    arm = Arm("a", {**PAGED.memory, "num_pages": 3})
    models = {each.name: build(task, each, 3) for each in (arm, *controls_of(arm))}
    ours, flat, still = (models[name] for name in ("a", "a/plain", "a/never"))
    assert ours.internal_heads == flat.internal_heads == 3
    assert parameters(ours) <= parameters(flat) <= parameters(ours) + 2 * task.dim
    assert parameters(still) == parameters(ours)
    assert state_size(ours) == state_size(flat) == state_size(still) == 3 * 2 * (2 * 16 * 32 + 16)
    for name, value in flat.state_dict().items():
        if not name.startswith("matched"):
            assert torch.equal(value, ours.state_dict()[name]), f"{name} starts alike"
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in still.state_dict().items())
    assert plain(Arm("b", {"use_symplectic_gating": True})).memory == {}
    assert controls_of(Arm("c", {"heads": 2})) == []
    off = never(Arm("k", {"kinetics_coupling": True, "kinetics_mix": 0.5}, off={"kinetics_mix": 0.0}))
    assert off.memory["kinetics_mix"] == 0.0


def test_the_map_that_matches_parameters_starts_as_nothing_and_learns():
    torch.manual_seed(0)
    memory, x = NeuralMemory(8, chunk_size=4), torch.randn(2, 8, 8)
    before = memory(x)[0]
    match_parameters(memory, parameters(memory) + 20)
    assert torch.equal(memory(x)[0], before)
    memory(x)[0].square().mean().backward()
    assert memory.matched.up.weight.grad.abs().max() > 0


def test_the_same_seed_gives_the_same_numbers():
    task = Interference(dim=8, pairs=4, chunk_size=4, batch_size=2)
    arm = Arm("a", {"use_symplectic_gating": True, "num_pages": 2}, switch_rate=0.5)
    setting = Setting(steps=3, test_batches=1)
    first = task.run(arm, 1, setting)
    torch.randn(3)
    assert task.run(arm, 1, setting) == first
    assert task.run(arm, 2, setting)["metrics"] != first["metrics"]


def test_switches_are_counted_per_opportunity():
    memory = NeuralMemory(
        8, chunk_size=4, use_symplectic_gating=True, num_pages=2, symplectic_page_threshold=-1.0, page_switch_every=8
    )
    x = torch.randn(3, 32, 8)
    with watched(memory) as whole:
        memory(x)
    with watched(memory) as cut:
        _, state = memory(x[:, :12])
        memory(x[:, 12:], state=state)
    record = whole.record()
    assert (record["events"], record["opportunities"], record["switch_rate"]) == (12, 12, 1.0)
    assert record["occupancy"] == [0.5, 0.5]
    assert cut.record() == record
    assert memory.page_switch_events == 24
    memory(x)
    assert whole.events == 12  # no longer watched
    assert "every opportunity" in warning("a", record)
    assert warning("a", {**record, "switch_rate": 0.5}) is None
    assert warning("a", Switches().record()) is None


def test_switches_of_each_layer():
    gated = {"use_symplectic_gating": True, "num_pages": 2}
    never, always = (NeuralMemory(8, 4, **gated, symplectic_page_threshold=limit) for limit in (2.0, -1.0))
    with watched(torch.nn.ModuleList([never, always])) as seen:
        for memory in (never, always, never, always):
            memory(torch.randn(3, 8, 8))
    assert seen.record()["layers"] == [0, 6]
    assert pooled([seen.record(), None, seen.record()])["layers"] == [0, 12]


def test_a_threshold_is_set_for_a_rate_in_carried_states():
    torch.manual_seed(0)
    memory = NeuralMemory(8, chunk_size=4, use_symplectic_gating=True, num_pages=2, page_switch_every=8)
    x = torch.randn(8, 32, 8)

    def run():
        _, state = memory(x[:, :12])
        memory(x[:, 12:], state=state)

    for rate in (0.0, 0.25, 1.0):
        set_thresholds(memory, run, rate)
        with watched(memory) as seen:
            run()
        assert seen.record()["switch_rate"] == pytest.approx(rate, abs=0.06)


@dataclass(frozen=True)
class Calm:
    """Complexity costs."""

    weight: float

    def __call__(self, model, calls):
        return self.weight * torch.cat([call.complexity.flatten() for call in calls]).mean()


def test_a_penalty_reaches_the_gate():
    task = Interference(dim=8, pairs=4, chunk_size=4, batch_size=2)

    def mean_complexity(weight):
        arm = Arm("a", {"use_symplectic_gating": True, "num_pages": 2}, penalty=Calm(weight))
        model = build(task, arm, 0)
        task.train(model, arm, 0, Setting(steps=8))
        calls = []
        with heard(model, calls.append):
            task.loss(model, next(iter(task.batches(0, "test", 1))))
        return torch.cat([call.complexity.flatten() for call in calls]).mean().item()

    assert mean_complexity(10.0) < 0.7 * mean_complexity(0.0)


def test_one_forgets_less_who_never_knew():
    metrics = [Metric("error"), Metric("forgetting", judged=True, beside="error")]

    def outcome(error, forgetting):
        return {"metrics": {"error": error, "forgetting": forgetting}, "pages": None, "parameters": 1, "training": {}}

    class Two(Planted):
        pass

    Two.metrics = metrics
    noise = (0.0, 0.01, -0.01)
    mine = [outcome(2.0 + x, 0.1 + x) | {"training": {"loss_tail": 1.0}} for x in noise]
    theirs = [outcome(1.0, 0.5) for _ in noise]
    outcomes = {"paged": mine, "paged/plain": theirs, "paged/never": theirs}
    record = arm_record(Two(), PAGED, outcomes, None)
    gains = record["gains"]
    assert gains["error"]["verdict"].startswith("worse than")
    assert improvement_pct(record, "error") == pytest.approx(-100.0)  # 2 where the best control has 1
    assert improvement_pct({**record, "gains": {}}, "error") is None
    assert gains["forgetting"]["verdict"] == "better than paged/plain and paged/never, but error is worse"


def test_what_is_kept_at_the_price_of_the_other_task_is_not_just_better():
    task = Interference(dim=8, pairs=4, chunk_size=4)

    def outcomes(a, b):
        metrics = {m.name: 0.5 for m in task.metrics} | {"error_a_after": a, "error_b": b}
        return [{"metrics": metrics, "pages": None, "parameters": 1, "training": {"loss_tail": 1.0}}] * 3

    controls = {"paged/plain": outcomes(0.6, 0.6), "paged/never": outcomes(0.6, 0.6)}

    def verdict(a, b):
        return arm_record(task, PAGED, {"paged": outcomes(a, b), **controls}, None)["gains"]["error_a_after"]["verdict"]

    assert verdict(0.4, 0.9) == "better than paged/plain and paged/never, but error_b is worse"
    assert verdict(0.4, 0.4) == "better than paged/plain and paged/never"


# runs


def plan(args, session):
    return Plan([Planted(gain=args.gain)], [PAGED])


def flags(p):
    p.add_argument("--gain", type=float, default=1.0)


FAKE = Benchmark("fake", "A fake.", plan, flags=flags, fields=lambda result, args: {"of_old": 3}, quick={"gain": 2.0})


def test_a_run_that_was_interrupted_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran = []
    run = Planted.run

    def counted(self, arm, seed, setting):
        out = run(self, arm, seed, setting)
        ran.append((arm.name, seed))
        return out

    monkeypatch.setattr(Planted, "run", counted)
    command = ["--repeats", "0", "--output-json", "out.json"]
    broken = Benchmark("fake", "A fake.", lambda a, s: Plan([Failing()], [PAGED]), flags=flags)
    assert broken.main(command) == 130
    assert "continues" in capsys.readouterr().err
    assert len(list(tmp_path.glob("runs/unfinished/fake-*.jsonl"))) == 1
    assert not (tmp_path / "out.json").exists()
    done = list(ran)
    monkeypatch.setattr(Failing, "failing", False)
    assert broken.main(command) == 0
    assert len(ran) == len(set(ran)) == 5 * 4
    assert ran[: len(done)] == done
    assert not list(tmp_path.glob("runs/unfinished/*"))
    assert json.loads((tmp_path / "out.json").read_text())["run"]["seeds"] == [0, 1, 2, 3, 4]


class Failing(Planted):
    failing = True

    def run(self, arm, seed, setting):
        if seed == 3 and self.failing:
            raise KeyboardInterrupt
        return super().run(arm, seed, setting)


def test_a_file_that_was_cut_off_keeps_what_is_whole(tmp_path):
    path = tmp_path / "x.jsonl"
    kept = Finished(path)
    kept.add("a", {"x": 1})
    kept.add("b", {"x": [2, None]})
    path.write_text(path.read_text()[:-5])
    again = Finished(path)
    assert "a" in again
    assert "b" not in again
    again.add("b", {"x": 3})
    assert Finished(path).results == {"a": {"x": 1}, "b": {"x": 3}}
    again.close()
    assert not path.exists()


def test_a_result_says_all(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["--quick", "--tag", "t", "--repeats", "0", "--output-json", "a.json", "--output-csv", "a.csv"]
    assert FAKE.main(command) == 0
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["of_old"] == 3
    assert result["schema"] == "1.1"
    assert result["config"]["gain"] == 2.0
    assert result["run"]["seeds"] == [0, 1]
    assert result["run"]["command"].startswith("python benchmarks/benchmark_fake.py --quick")
    assert {"versions", "commit", "device", "threads", "configuration"} <= set(result["run"])
    assert "better than" in capsys.readouterr().out
    assert FAKE.main(["--quick", "--gain", "0.0", *command[1:]]) == 0  # what the user says goes before --quick
    assert json.loads((tmp_path / "a.json").read_text())["config"]["gain"] == 0.0
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 2 * 3 * 4  # runs, metrics, arms with controls and the constant
    assert rows[0]["verdict"].startswith("better")


def test_a_csv_file_of_other_columns_is_refused_before_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    monkeypatch.setattr(Planted, "run", lambda *a: pytest.fail("it ran"))
    assert FAKE.main(["--output-csv", str(path)]) == 2
    assert "columns" in capsys.readouterr().err
    with pytest.raises(OtherSchema):
        append_rows(path, [])
    assert path.read_text() == "a,b\n1,2\n"
    check_columns(tmp_path / "new.csv")


@pytest.mark.parametrize(
    "wrong", [["--seeds", "0"], ["--steps", "x"], ["--device", "toaster"], ["--no-such-flag"]], ids=lambda w: w[0]
)
def test_bad_arguments_are_one_line_and_status_2(wrong, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = FAKE.main(wrong)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert wrong[0] in capsys.readouterr().err


def test_arms_that_cannot_be_described_are_refused():
    arm = Arm("a", {"page_router": lambda page, complexity, angle: page})
    with pytest.raises(TypeError, match="named function"):
        arm.what()
