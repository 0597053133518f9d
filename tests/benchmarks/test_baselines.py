"""The committed baselines of the regression check."""

import copy
import json

import pytest
from check_regression import main
from harness.environment import REPOSITORY

RESULTS = REPOSITORY / "benchmarks" / "results"
NAMES = ("symplectic", "codebook_transfer")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["baseline", "quick_baseline"])
def test_committed_baselines_are_sound(name, kind, tmp_path):
    """Each passes against itself, fails with every error of an arm doubled, and is refused against the other kind."""
    baselines = {n: json.loads((RESULTS / f"{n}_{kind}.json").read_text()) for n in NAMES}
    assert baselines[name]["run"]["command"].startswith(f"python benchmarks/benchmark_{name}.py")
    assert "+changes" not in baselines[name]["run"]["commit"]

    def status(latest, other=None):
        files = {}
        for key, record in {**latest, **{f"base_{n}": b for n, b in (other or baselines).items()}}.items():
            files[key] = tmp_path / f"{key}.json"
            files[key].write_text(json.dumps(record))
        flags = ["--baseline", "base_symplectic", "--latest", "symplectic"]
        flags += ["--codebook-baseline", "base_codebook_transfer", "--codebook-latest", "codebook_transfer"]
        return main([str(files.get(flag, flag)) for flag in flags])

    assert status(baselines) == 0
    worse = copy.deepcopy(baselines[name])
    for task in worse["tasks"].values():
        for metrics in task["arms"].values():
            for found in metrics["metrics"].values():
                found["mean"] = 2 * found["mean"]
    assert status({**baselines, name: worse}) == 1
    elsewhere = copy.deepcopy(baselines[name])
    elsewhere["run"]["device"]["type"] = "cuda"
    assert status({**baselines, name: elsewhere}) == 3
    kinds = {"baseline": "quick_baseline", "quick_baseline": "baseline"}
    others = {n: json.loads((RESULTS / f"{n}_{kinds[kind]}.json").read_text()) for n in NAMES}
    assert status(baselines, others) == 3
