"""Every runner: its plan can be built, its fields and report hold together, whatever the numbers; each is run twice."""

import json
from importlib import import_module

import pytest
import torch
from harness.arms import build
from harness.environment import REPOSITORY
from harness.program import Benchmark
from harness.session import Session, with_controls
from harness.task import generator

FILES = sorted((REPOSITORY / "benchmarks").glob("benchmark_*.py"))
RUNNERS = [f.stem for f in FILES if "BENCHMARK.main()" in f.read_text()]


def numbers_without_training(self, task, arm, seed, setting):
    """A build of the model, and numbers that look like a result."""
    model = build(task, arm, seed)
    noise = torch.rand(len(task.metrics), generator=generator(arm.name, seed)).tolist()
    share = [1 / arm.pages] * arm.pages
    pages = (
        {"events": 2, "layers": [2], "opportunities": 4, "switch_rate": 0.5, "occupancy": share}
        if arm.pages > 1
        else None
    )
    return {
        "metrics": {m.name: 0.5 + 0.1 * x for m, x in zip(task.metrics, noise, strict=True)},
        "pages": pages,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": {"loss_first": [1.0], "loss_tail": 0.7},
    }


@pytest.mark.parametrize("name", RUNNERS)
def test_a_runner_plans_and_reports(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Session, "cell", numbers_without_training)
    benchmark = import_module(name).BENCHMARK
    assert isinstance(benchmark, Benchmark)
    assert f"benchmark_{benchmark.name}" == name
    files = ["--output-json", "r.json", "--output-csv", "r.csv", "--output-png", "r.png"]
    assert benchmark.main(["--quick", "--repeats", "0", *files]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    for task in result["tasks"].values():
        assert all(arm["parameters"] > 0 or not result["config"]["steps"] for arm in task["arms"].values())
        judged = [arm for arm in task["arms"].values() if arm["controls"]]
        assert all(arm["gains"][task["metrics"][0]["name"]]["verdict"] for arm in judged)
    assert (tmp_path / "r.png").stat().st_size > 5000
    assert capsys.readouterr().out.count("\n") > 5


SMALL = ["--dim", "8", "--chunk-size", "4", "--batch-size", "2", "--steps", "2"]
TRANSFER = [*SMALL, "--seq-len", "8", "--long-seq-len", "24"]
SEARCH = ["--search-seeds", "1"]
TINY = {
    "benchmark_symplectic": [*SMALL, "--seq-len", "8", "--long-seq-len", "24"],
    "benchmark_paging": [*SMALL, "--seq-len", "8", "--arms", "paging,recognised"],
    "benchmark_mac_paging": ["--dim", "8", "--batch-size", "2", "--steps", "2", "--seq-len", "16"],
    "benchmark_needle": [*SMALL, "--needles", "3", "--seq-len", "8"],
    "benchmark_structure_interleaving": [*SMALL, "--needles", "3", "--before", "4", "--seq-len", "8"],
    "benchmark_grammar": ["--dim", "8", "--batch-size", "2", "--steps", "2", "--memory-batch", "4"],
    "benchmark_gate_variants": [*SMALL, "--seq-len", "8", "--variants", "quorum_budget,combinatorial_codebook"],
    "benchmark_threshold_sweep": [*SMALL, "--seq-len", "8", "--thresholds", "0.1"],
    "benchmark_kinetics_sweep": [*TRANSFER, "--mixes", "0.5", "--selection-seeds", "1"],
    "benchmark_dmd": ["--batch-size", "4", "--noises", "1"],
    "benchmark_switch_budget": [*SMALL, "--seq-len", "16"],
    "benchmark_switch_budget_sweep": [*SMALL, "--seq-len", "8", "--page-thresholds", "0.1", *SEARCH],
    "benchmark_codebook_sweep": [*SMALL, "--seq-len", "24", "--mixes", "0,0.5", "--sizes", "4", *SEARCH],
    "benchmark_codebook_transfer": TRANSFER,
    "benchmark_manifold_paging_transfer": TRANSFER,
    "benchmark_mutation_selection": [*SMALL, "--seq-len", "16", "--population", "2", "--generations", "1"],
    "benchmark_mutation_transfer": TRANSFER,
}
LONG = {"symplectic", "kinetics_sweep", "switch_budget_sweep", "codebook_sweep", "mutation_transfer"}
LONG |= {"codebook_transfer", "manifold_paging_transfer"}


def marked(name):
    return pytest.param(name, marks=[pytest.mark.slow] if name.removeprefix("benchmark_") in LONG else [])


@pytest.mark.parametrize("name", [marked(name) for name in RUNNERS])
def test_the_same_command_gives_the_same_numbers(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    benchmark = import_module(name).BENCHMARK
    common = ["--seeds", "1", "--test-batches", "1", "--repeats", "0", "--output-json", "r.json"]
    results = []
    for _ in range(2):
        assert benchmark.main([*TINY[name], *common]) == 0
        results.append(json.loads((tmp_path / "r.json").read_text()))
    apart = {"timestamp_utc", "run"}
    first, second = ({k: v for k, v in result.items() if k not in apart} for result in results)
    assert json.dumps(first) == json.dumps(second)  # as text: where nothing was asked, a mean is not a number


def test_mac_paging_prints_losses_time_and_switches(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Session, "cell", numbers_without_training)
    monkeypatch.setattr(Session, "times", lambda *_: {"gating_paging": {"fwd_ms": 1.0, "train_ms": 3.25}})
    assert import_module("benchmark_mac_paging").BENCHMARK.main(["--quick", "--output-json", "r.json"]) == 0
    variant = json.loads((tmp_path / "r.json").read_text())["variants"]["gating_paging"]
    held_out = f"{variant['val_loss']:.4f}"
    wanted = f"gating_paging: training 0.7000, held out {held_out}, 3.2 ms a training step, switches [4] (total 4)"
    assert wanted in capsys.readouterr().out.splitlines()


PHASES = ["--long-warmup-steps", "1", "--long-perturb-steps", "2", "--long-recovery-steps", "4"]
INTERFERENCE = ["--interference-steps", "5", "--interference-eval-iters", "3"]
IN_PHASES = {
    "symplectic": (PHASES, {"long_horizon_recovery": (7, 1)}),
    "codebook_transfer": ([*PHASES, *INTERFERENCE], {}),
    "manifold_paging_transfer": ([*PHASES, *INTERFERENCE], {}),
    "mutation_transfer": ([*PHASES, *INTERFERENCE], {}),
    "kinetics_sweep": ([*PHASES, *INTERFERENCE], {}),
    "mutation_selection": ([*PHASES, *INTERFERENCE, "--use-transfer-fitness"], {}),
}


@pytest.mark.parametrize("name", IN_PHASES)
def test_flags_of_phases_reach_their_task(name, tmp_path, monkeypatch, capsys):
    """In the reported runs and in the search before them."""
    flags, wanted = IN_PHASES[name]
    wanted = wanted or {"long_horizon": (7, 1), "interference": (5, 3)}
    seen = {}

    def noted(self, task, arm, seed, setting):
        seen.setdefault(task.name, set()).add((setting.steps, setting.test_batches))
        return numbers_without_training(self, task, arm, seed, setting)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Session, "cell", noted)
    benchmark = import_module(f"benchmark_{name}").BENCHMARK
    assert benchmark.main(["--quick", "--repeats", "0", "--steps", "9", *flags]) == 0
    others = {task: {(9, 1)} for task in seen if task not in wanted}
    assert seen == {**{task: {setting} for task, setting in wanted.items()}, **others}

    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--long-cooldown-steps", "1"])
    assert stopped.value.code == 2
    assert "--long-cooldown-steps" in capsys.readouterr().err


def test_controls_follow_their_arm():
    plan = import_module("benchmark_symplectic").arms(16, 0.5)
    names = [arm.name for arm in with_controls(plan)]
    assert names[:4] == ["baseline", "symplectic", "symplectic/plain", "symplectic_paging"]
    assert "dmd_paging/never" in names
    assert len(set(names)) == len(names)
