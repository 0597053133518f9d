"""The regression check: passes on the same result, fails on a planted regression, refuses what is not comparable."""

import copy
import json
import math

import pytest
from check_regression import main
from regression.metrics import chance


def spread_of(values):
    n = len(values)
    mean = sum(values) / n
    return {"n": n, "mean": mean, "sd": math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)), "values": values}


def result(benchmark, tasks, arms, level=0.5):
    values = [level - 0.02, level - 0.01, level, level + 0.01, level + 0.02]
    calls = {"fwd_ms": 10.0, "fwd_ms_calls": [9.0, 10.0, 11.5], "train_ms": 20.0, "train_ms_calls": [19.0, 20.0, 20.5]}
    return {
        "benchmark": benchmark,
        "schema": "1.1",
        "config": {"dim": 16, "seeds": 5, "seed": 0, "threshold": None, "device": "cpu", "quick": False},
        "run": {"seeds": [0, 1, 2, 3, 4], "device": {"type": "cpu", "class": "cpu: some, 2 cores"}, "threads": 1},
        "tasks": {t: {"arms": {a: {"metrics": {m: spread_of(values) for m in ms}} for a in arms}} for t, ms in tasks},
        "timing": {"repeats": 3, "arms": {arms[1]: calls}},
    }


def symplectic():
    tasks = [(t, ["error"]) for t in ("spiral", "helix_drift")]
    tasks += [("long_horizon_recovery", ["clean_mse_post", "phase_recovery_gain"])]
    return result("symplectic", tasks, ["baseline", "symplectic_phase_paging", "symplectic_phase_paging/never"])


def codebook():
    tasks = [("long_horizon", ["clean_mse_post", "phase_err_post"]), ("interference", ["error_a_after"])]
    found = result("codebook_transfer", tasks, ["baseline", "codebook_champion_paging"])
    score = {"transfer_score": 1.0, "transfer_score_spread": {"n": 5, "mean": 1.0, "sd": 0.05}}
    return {**found, "variants": {"codebook_champion_paging": score}}


@pytest.fixture
def check(tmp_path, capsys):
    def run(latest, *flags, baseline=None, codebook_latest=None):
        files = {"b": baseline or symplectic(), "l": latest, "cb": codebook(), "cl": codebook_latest or codebook()}
        for name, record in files.items():
            (tmp_path / name).write_text(json.dumps(record))
        b, latest_file, cb, cl = (str(tmp_path / name) for name in files)
        own = ["--baseline", b, "--latest", latest_file, "--codebook-baseline", cb, "--codebook-latest", cl]
        try:
            status = main([*own, *flags])
        except SystemExit as end:
            status = end.code
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


def planted(record, *path, value):
    out = copy.deepcopy(record)
    *way, last = path
    place = out
    for step in way:
        place = place[step]
    place[last] = value
    return out


def metric(arm, name, task="spiral"):
    return ("tasks", task, "arms", arm, "metrics", name, "mean")


SPIRAL = metric("symplectic_phase_paging", "error")
GAIN = metric("symplectic_phase_paging", "phase_recovery_gain", "long_horizon_recovery")
# what five seeds with a standard deviation of 0.0158 may differ by: 3.747 sd sqrt(2 / 5)
TOLERANCE = 3.74695 * 0.0158114 * math.sqrt(0.4)


def test_the_tolerance_is_what_chance_gives():
    assert chance(5, 0.0158114) == pytest.approx(TOLERANCE, rel=1e-4)
    assert chance(1, None) == 0.0
    # two sets of seeds of the same distribution: about 1 of 100 exceed it
    torch = pytest.importorskip("torch")
    sets = torch.randn(4000, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    worse = sets[:, 1].mean(dim=1) - sets[:, 0].mean(dim=1)
    bound = torch.tensor([chance(5, sd) for sd in sets[:, 0].std(dim=1).tolist()])
    assert (worse > bound).double().mean().item() < 0.03


def test_the_same_result_passes(check):
    status, said = check(symplectic())
    assert status == 0
    assert "FAIL" not in said
    assert "/never" not in said  # controls are not watched


@pytest.mark.parametrize("path", [SPIRAL, metric("baseline", "error", "helix_drift")])
def test_a_planted_regression_is_found_and_an_improvement_passes(check, path):
    status, said = check(planted(symplectic(), *path, value=0.5 + 1.1 * TOLERANCE))
    assert status == 1
    assert said.count("FAIL") == 1
    assert check(planted(symplectic(), *path, value=0.5 + 0.9 * TOLERANCE))[0] == 0
    assert check(planted(symplectic(), *path, value=0.1))[0] == 0


def test_a_gain_that_shrinks_is_a_regression(check):
    assert check(planted(symplectic(), *GAIN, value=0.5 - 1.1 * TOLERANCE))[0] == 1
    assert check(planted(symplectic(), *GAIN, value=0.9))[0] == 0
    assert check(planted(symplectic(), *GAIN, value=0.4), "--min-gain-regression-pct", "25")[0] == 0


def test_a_regression_of_the_codebook_is_found(check):
    worse = planted(codebook(), "variants", "codebook_champion_paging", "transfer_score", value=1.3)
    assert check(symplectic(), codebook_latest=worse)[0] == 1
    worse = planted(codebook(), *metric("baseline", "error_a_after", "interference"), value=0.9)
    assert check(symplectic(), codebook_latest=worse)[0] == 1


def test_what_is_not_a_number_is_a_regression(check):
    assert check(planted(symplectic(), *SPIRAL, value=None))[0] == 1


def test_flags_widen_and_never_narrow(check):
    worse = planted(symplectic(), *SPIRAL, value=0.5 + 2 * TOLERANCE)
    assert check(worse)[0] == 1
    assert check(worse, "--max-loss-regression-pct", "20")[0] == 0
    within = planted(symplectic(), *SPIRAL, value=0.5 + 0.9 * TOLERANCE)
    assert check(within, "--max-loss-regression-pct", "0")[0] == 0


def test_times_are_compared_within_one_machine_class(check):
    slow = ("timing", "arms", "symplectic_phase_paging", "fwd_ms")
    assert check(planted(symplectic(), *slow, value=11.4))[0] == 0  # as slow a call is in the baseline
    status, said = check(planted(symplectic(), *slow, value=11.6))
    assert status == 1
    assert "symplectic_phase_paging fwd_ms" in said
    assert check(planted(symplectic(), *slow, value=11.6), "--max-time-regression-pct", "20")[0] == 0
    other = planted(symplectic(), "run", "device", "class", value="cpu: another, 8 cores")
    status, said = check(planted(other, *slow, value=99.0))
    assert status == 0
    assert "times are not compared: machine class" in said
    few = planted(symplectic(), "timing", "repeats", value=0)
    assert check(planted(few, "timing", "arms", value={}))[0] == 0


@pytest.mark.parametrize(
    ("path", "value", "names"),
    [
        (("schema",), "1.2", "schema"),
        (("config", "dim"), 32, "dim"),
        (("config", "seed"), 1, "seed"),
        (("config", "threshold"), 0.5, "threshold"),
        (("config", "new_flag"), 1, "new_flag"),
        (("run", "device", "type"), "cuda", "device"),
        (("benchmark",), "paging", "benchmark"),
        (("config",), None, "configuration"),
        (("tasks",), {}, "spiral"),
    ],
    ids=lambda x: x[-1] if isinstance(x, tuple) else None,
)
def test_another_configuration_or_device_is_refused(check, path, value, names):
    status, said = check(planted(symplectic(), *path, value=value))
    assert status == 3
    assert names in said


def test_a_value_that_is_no_number_is_refused(check):
    assert check(planted(symplectic(), *SPIRAL, value=True))[0] == 3
    assert check(symplectic(), baseline=planted(symplectic(), *SPIRAL, value=None))[0] == 3


def test_the_device_is_no_matter_of_configuration(check):
    assert check(planted(symplectic(), "config", "quick", value=True))[0] == 0


@pytest.mark.parametrize("content", [None, "{", "[1]"], ids=["missing", "broken", "a list"])
def test_a_file_that_cannot_be_read_is_one_line_and_status_2(tmp_path, capsys, content):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    assert main(["--baseline", str(path), "--latest", str(path)]) == 2
    said = capsys.readouterr().err
    assert "x.json" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--baseline", "a"],
        ["--baseline", "a", "--latest", "b", "--codebook-latest", "c"],
        ["--baseline", "a", "--latest", "b", "--max-loss-regression-pct", "-1"],
    ],
)
def test_bad_arguments_are_status_2(flags, capsys):
    with pytest.raises(SystemExit) as end:
        main(flags)
    assert end.value.code == 2
    assert capsys.readouterr().err
