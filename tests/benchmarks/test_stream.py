"""benchmark_stream.py: what it carries, what it concludes, and a short run end to end."""

import json

import benchmark_stream as bench
import pytest
import torch
from speed.arms import Setup


def marks(**changes):
    base = {"tokens": 1, "best": 100.0, "median": 90.0, "to_control": 1.1, "seconds": 1.0}
    base |= {"resident": 500_000_000, "state": 400, "rms": 1.0}
    columns = {name: changes.get(name, [value] * 3) for name, value in base.items()}
    return [bench.Mark(*row) for row in zip(*columns.values(), strict=True)]


def broken(found):
    return {name for name, claim in found["claims"].items() if not claim["met"]}


def test_a_flat_stream_passes():
    found = bench.verdict(marks(), 900_000_000)
    assert found["met"]
    assert broken(found) == set()
    # the machine's noise is told, not judged; nor is the allocator's filling up before the first mark
    noisy = bench.verdict(marks(best=[100.0, 50.0, 80.0], resident=[0, 500_000_000, 501_000_000]), 0)
    assert noisy["met"]
    assert noisy["spread_of_pieces"]["fastest"] == 1.0


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"to_control": [1.1, 1.0, 0.9]}, "spread of the speed relative to the control"),
        ({"resident": [0, 500_000_000, 520_000_000]}, "growth of resident memory"),
        ({"state": [400, 400, 404]}, "growth of the state"),
        ({"rms": [1.0, float("nan"), 1.0]}, "parts with outputs not finite"),
    ],
)
def test_each_claim_can_fail(changes, claim):
    found = bench.verdict(marks(**changes), 0)
    assert broken(found) == {claim}
    assert not found["met"]


def test_a_peak_over_a_gigabyte_fails():
    assert broken(bench.verdict(marks(), 1_100_000_000)) == {"peak over idle"}


def test_the_state_is_counted_without_its_history():
    memory = bench.new_memory(Setup(engine="auto"))
    with torch.no_grad():
        _, state = memory(torch.randn(1, 19, bench.DIM))
    weights = sum(p.numel() for p in memory.memory_model_parameters)
    # anchor, memory and momentum, and the three tokens that wait
    assert bench.state_bytes(state) == 4 * (3 * weights + 3 * bench.DIM)


def test_the_pieces_are_one_stream():
    """The marks' outputs are those of a memory that reads on, not of one that begins anew."""
    setup = Setup(dtype="float64", engine="auto")
    memory = bench.new_memory(setup)
    seen = list(bench.stream(memory, setup, tokens=300, piece=64, marks=2))
    assert [done for done, _ in seen] == [64, 128, 192, 256, 300]
    first, last = (mark for _, mark in seen if mark is not None)
    assert (first.tokens, last.tokens) == (192, 300)

    generator = torch.Generator().manual_seed(setup.seed + 1)
    x = torch.cat([torch.randn(1, n, bench.DIM, generator=generator) for n in (64, 64, 64, 64, 44)], dim=1).double()
    with torch.no_grad():
        out, state = memory(x)
    parts = out[:, 192:].split((64, 44), dim=1)
    assert last.rms == pytest.approx(torch.stack([part.square().mean() for part in parts]).mean().sqrt().item())
    assert first.state == last.state
    assert first.to_control is not None


def test_a_run_end_to_end(tmp_path, capsys):
    out, png = tmp_path / "stream.json", tmp_path / "stream.png"
    argv = ["--tokens", "1000", "--piece", "64", "--output-json", str(out), "--output-png", str(png)]
    assert bench.main(argv) == 0
    assert "met: growth of the state 0 MB" in capsys.readouterr().out
    assert png.read_bytes().startswith(b"\x89PNG")
    result = json.loads(out.read_text())
    assert {"benchmark", "schema", "run", "memory", "used", "marks", "verdict"} == set(result)
    assert result["run"]["command"].startswith("python benchmarks/benchmark_stream.py --tokens 1000")
    assert [mark["tokens"] for mark in result["marks"]][-1] == 1000
    assert len(result["marks"]) == 16
    with pytest.raises(SystemExit):
        bench.main(["--piece", "0"])
    assert "piece must be an integer of at least 1, got 0" in capsys.readouterr().err
