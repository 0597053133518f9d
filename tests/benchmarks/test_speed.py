"""benchmark_speed.py: what it measures, refuses, reports where something fails, and a run end to end."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import benchmark_speed
import pytest
import torch
from harness.workers import Worker, WorkerFailure
from speed import gate
from speed.arms import Setup, build_module, built, inputs, subject, tiny
from speed.cases import ENWIK8_TRANSFORMER, NAMED, as_attention, choose_cases, shortened, sweep_case
from speed.measure import Arm, Options, judged, measure_case, refusals, steps
from speed.report import failures, judge, report

from titans_pytorch.training.mac import MacConfig, build_mac

from .. import helpers

FAKE = Path(__file__).with_name("fake_worker.py")
CASE = next(case for case in NAMED if case.name == "readme")
OPTIONS = Options({"device": "cpu", "dtype": "float32", "seed": 0, "engine": "auto"}, repeats=2, timeout=30)


class FakeArm(Arm):
    def __init__(self, name, **script):
        super().__init__(name, sys.executable)
        self.script = script

    def worker(self, threads):
        return Worker([self.python, str(FAKE), json.dumps(self.script)])


def measured(case=CASE, ours=None, peer=None):
    arms = [FakeArm("ours", **(ours or {})), FakeArm("peer", **(peer or {})), FakeArm("attention")]
    told = []
    record = judge(measure_case(case, arms, OPTIONS, told.append))
    assert len(told) <= steps(case, arms, OPTIONS)
    return record, told


def test_arms_take_turns_and_the_best_call_counts():
    record, told = measured()
    assert told[:1] == ["gate"]
    arms = ["ours", "peer", "attention"]
    turns = [text.split()[0] for text in told if text.endswith(" train")]
    assert turns == arms * 3  # warm-up and two repeats
    assert record["arms"]["peer"]["train"] == {
        "status": "ok",
        "best": 0.25,
        "median": 0.375,
        "calls": [0.5, 0.25] * 2,
        "tokens": 10,
        "tokens_per_second": 40,
    }
    assert record["ratios"] == {"forward": 1, "train": 1, "memory": 1, "decode": 1}
    goals = {goal["quantity"]: goal for goal in record["goals"]}
    assert goals["train"] == {"quantity": "train", "target": 8, "got": 1, "met": False}
    assert record["shares"]["forward"] == pytest.approx(sum(record["operations"].values()) / 0.25 / 1e9)
    assert record["shares"]["train"] == pytest.approx(3 * record["shares"]["forward"])
    assert failures([record]) == []


def test_ratios_and_goals():
    slow = {"calls": [2.5], "tokens": None}
    peer = {"time forward": slow, "time train": slow, "time decode": {"calls": [1.0], "tokens": 10}}
    record, _ = measured(peer=peer | {"memory": {"idle": 0, "peak": 1000, "over_idle": 1000}})
    assert record["ratios"] == {"forward": 10, "train": 10, "memory": 0.2, "decode": 4}
    assert [(g["quantity"], g["met"]) for g in record["goals"]] == [
        ("forward", True),
        ("train", True),
        ("memory", True),
    ]
    text = report([record])
    assert "10x    6x  yes" in text
    assert "1/5   1/4  yes" in text
    assert "goals: 3 of 3 met" in text


def test_a_peer_that_is_killed_is_reported():
    record, _ = measured(peer={"memory": "die", "prepare forward": "lack", "time decode": "raise"})
    peer = record["arms"]["peer"]
    assert peer["memory"]["status"] == peer["forward"]["status"] == "out of memory"
    assert peer["train"] == peer["memory"]  # the same step again is not tried
    assert peer["decode"] == {"status": "failed", "message": "RuntimeError: shapes do not fit"}
    assert record["arms"]["ours"]["train"]["status"] == "ok"
    assert record["ratios"] == {}
    assert {goal["met"] for goal in record["goals"]} == {None}
    assert failures([record]) == []
    text = report([record])
    assert "readme: peer, memory, train: out of memory: the system killed the process" in text
    assert "goals: 0 of 3 met, 3 not judged" in text


def test_a_peer_without_an_answer_says_nothing_against_ours():
    record, _ = measured(peer={"write_answer": "raise"})
    assert record["gate"]["peer"]["status"] == "no answer"
    assert record["arms"]["ours"]["forward"]["status"] == "ok"
    assert "not compared with the peer" in report([record])


@pytest.mark.parametrize("wrong", [{"output": 0.5, "gradient": 0}, {"output": float("nan"), "gradient": 0}, "raise"])
def test_a_wrong_answer_is_not_timed(wrong):
    record, told = measured(ours={"compare_with_peer": wrong})
    assert {r["status"] for name in ("ours", "peer") for r in record["arms"][name].values()} == {"refused"}
    assert {r["status"] for r in record["arms"]["attention"].values()} == {"ok"}
    assert not any(text.startswith(("ours", "peer")) for text in told)
    assert {goal["met"] for goal in record["goals"]} == {False}
    assert len(failures([record])) == 4

    record, _ = measured(ours={"compare_with_reference": wrong})
    assert record["arms"]["ours"]["train"]["status"] == "refused"
    assert record["arms"]["peer"]["train"]["status"] == "ok"


def test_ours_out_of_time_misses_its_goals():
    slow = {"prepare train": "hang"}
    arms = [FakeArm("ours", **slow), FakeArm("attention")]
    record = judge(measure_case(CASE, arms, replace(OPTIONS, timeout=3)))
    assert record["arms"]["ours"]["train"]["status"] == "timeout"
    assert {g["quantity"]: g["met"] for g in record["goals"]} == {"forward": None, "train": False, "memory": None}
    assert failures([record]) == ["readme: ours train: timeout", "readme: ours decode: timeout"]


def test_memory_in_gigabytes_is_judged_without_the_peer():
    case = next(case for case in NAMED if case.name == "enwik8-batch-4")
    record, _ = measured(case, peer={"memory": "die"})
    assert record["goals"] == [{"quantity": "gigabytes", "target": 24, "got": 200 / 1e9, "met": True}]
    assert "24 GB  yes" in report([record])


def test_names_choose_cases():
    lengths, chunks = (64, 256), (16, 128)
    names = [case.name for case in choose_cases(["readme", "sweep"], lengths, chunks)]
    assert names == ["readme", "sweep-64-16", "sweep-256-16", "sweep-256-128"]  # no chunk longer than its sequence
    assert [c.name for c in choose_cases(["sweep-256-16"], lengths, chunks)] == ["sweep-256-16"]
    assert len(choose_cases(None, lengths, chunks)) == len(NAMED) + 3
    with pytest.raises(ValueError, match="cases must be named, sweep, readme.*, got 'reamde'"):
        choose_cases(["reamde"], lengths, chunks)


def test_the_preset_is_train_mac_s():
    with torch.device("meta"):
        ours = build_module({"kind": "transformer", "kwargs": ENWIK8_TRANSFORMER}, Setup(device="meta"))
        preset = build_mac(MacConfig(), torch.device("meta"))
    shapes = [{k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (ours, preset)]
    assert shapes[0] == shapes[1]
    assert built(ENWIK8_TRANSFORMER["neural_memory_kwargs"], None).items() <= MacConfig().memory_kwargs().items()
    for name, value in vars(MacConfig()).items():
        assert ENWIK8_TRANSFORMER.get(name, value) in (value, list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize("case", [*NAMED, sweep_case(512, 256)], ids=lambda case: case.name)
def test_every_case_runs_in_miniature(case):
    setup = Setup()
    for small in (tiny(shortened(case).as_dict()), tiny(as_attention(shortened(case)).as_dict())):
        subject(small, setup).train()
    if "decode" in case.quantities and case.kind == "memory":
        arm = subject(tiny(case.as_dict()), setup)
        arm.prepare_decode()
        arm.decode()


def test_inputs_and_start_values_are_the_seed_s():
    case = tiny(CASE.as_dict())
    one, same, other = (Setup(seed=seed) for seed in (1, 1, 2))
    assert torch.equal(inputs(case, one, 2, 8), inputs(case, same, 2, 8))
    assert not torch.equal(inputs(case, one, 2, 8), inputs(case, other, 2, 8))
    weights = [build_module(case, s).projections.to_keys.weight for s in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_attention_decodes_what_it_computes_at_once():
    case = tiny(as_attention(CASE).as_dict())
    layer = build_module(case, Setup(dtype="float64"))
    x = inputs(case, Setup(dtype="float64"), 2, 11)
    with torch.no_grad():
        torch.testing.assert_close(layer.decode(x[:, :7], x[:, 7:]), layer(x)[:, -1:])


def test_the_gate_tells_right_from_wrong(tmp_path, monkeypatch):
    case, setup = tiny(CASE.as_dict()), Setup(engine="auto")
    tolerance = {"output": 1e-8, "gradient": 1e-7}
    right = gate.compare_with_reference(case, setup, batch=2, tokens=8)
    assert judged(right, tolerance)["status"] == "ok"

    # our own answer in the place of the peer's
    path = str(tmp_path / "answer.pt")
    gate.write_answer(case, setup, 2, 8, path)
    monkeypatch.setattr("titans_pytorch.load_peer_state_dict", lambda m, s: m.load_state_dict(s), raising=False)
    assert gate.compare_with_peer(case, setup, path) == {"output": 0, "gradient": 0}
    other = {**case, "kwargs": {**case["kwargs"], "default_step_transform_max_lr": 0.5}}
    assert judged(gate.compare_with_peer(other, setup, path), tolerance)["status"] == "wrong"

    def slower_reference(c, s):
        return build_module(other if s.engine == "reference" else c, s)

    monkeypatch.setattr(gate, "build_module", slower_reference)
    wrong = judged(gate.compare_with_reference(case, setup, batch=2, tokens=8), tolerance)
    assert wrong["status"] == "wrong"
    assert set(refusals({"reference": wrong})) == {"ours"}


def test_a_run_end_to_end(tmp_path, capsys):
    out, png = tmp_path / "speed.json", tmp_path / "speed.png"
    argv = ["--quick", "--cases", "sweep", "--lengths", "8", "--chunks", "2", "--threads", "1", "--clock", "process"]
    argv += ["--quantities", "train"]
    assert benchmark_speed.main([*argv, "memory", "--output-json", str(out), "--output-png", str(png)]) == 0
    assert "sweep-8-2" in capsys.readouterr().out
    assert png.read_bytes().startswith(b"\x89PNG")
    result = json.loads(out.read_text())
    assert set(result) == {"benchmark", "schema", "run", "options", "arms", "complete", "cases"}
    assert {"command", "configuration", "seeds", "versions", "commit", "device", "threads"} <= set(result["run"])
    assert result["run"]["threads"] == 1
    (case,) = result["cases"]
    assert case["gate"]["reference"]["status"] == "ok"
    assert set(case["arms"]) == {"ours", "attention"}
    for arm in case["arms"].values():
        assert arm["train"]["status"] == arm["memory"]["status"] == "ok"
        assert arm["train"]["best"] == min(arm["train"]["calls"]) > 0
        assert arm["memory"]["peak"] >= arm["memory"]["idle"] > 0
    assert case["engines"] == ["ChunkwiseEngine"]
    assert case["shares"]["train"] > 0

    words = [*argv, "memory", "--output-json", str(out)]
    assert result["complete"]
    out.write_text(json.dumps({**result, "complete": False}))
    assert benchmark_speed.main(words) == 0
    assert json.loads(out.read_text())["cases"] == result["cases"], "what was measured is kept"
    case["arms"]["ours"]["train"] = {"status": "timeout", "message": ""}
    out.write_text(json.dumps({**result, "complete": False}))
    assert benchmark_speed.main([*words, "--timeout", "800"]) == 0
    again = json.loads(out.read_text())["cases"]
    assert len(again) == 1
    assert again[0]["arms"]["ours"]["train"]["status"] == "ok", "what failed is measured again"


def test_an_environment_that_does_not_serve_is_named():
    ours = (sys.executable, "whose titans_pytorch is this one")
    for peer, message in (ours, ("/no/python", "cannot run /no/python")):
        with pytest.raises(ValueError, match=helpers.message(message)):
            benchmark_speed.check_arms([Arm("peer", peer)], CASE, replace(OPTIONS, timeout=60))


def test_arguments_that_do_not_fit_are_named(capsys):
    for argv, message in (
        (["--cases", "reamde"], "cases must be ..., got 'reamde'"),
        (["--repeats", "0"], "must be an integer of at least 1, got '0'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            benchmark_speed.main(argv)
        assert stopped.value.code == 2
        assert re.search(helpers.message(message), capsys.readouterr().err)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hold a process to it")
def test_a_memory_limit_stops_an_arm():
    from speed.measure import Measurement, default_arms

    options = replace(OPTIONS, memory_limit=200_000_000, threads=1, timeout=60)
    with Measurement(default_arms(None)[0], sweep_case(4096, 64), options) as measurement:
        with pytest.raises(WorkerFailure) as failure:
            measurement.ask("prepare", what="train")
        assert failure.value.kind == "out of memory"
