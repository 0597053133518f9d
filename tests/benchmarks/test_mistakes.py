"""What a user reads after a mistake on a benchmark's command line: one line that names it, before anything is run."""

import benchmark_lengths
import benchmark_paging
import benchmark_precision
import benchmark_speed
import benchmark_stream
import pytest


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (
            benchmark_paging.BENCHMARK.main,
            ["--seeds", "x"],
            "argument --seeds: must be an integer of at least 1, got 'x'",
        ),
        (benchmark_paging.BENCHMARK.main, ["--sedes", "3"], "unknown setting --sedes; the nearest is --seeds"),
        (
            benchmark_paging.BENCHMARK.main,
            ["--device", "cdua"],
            "--device must be one that torch can use here, got 'cdua'",
        ),
        (benchmark_precision.main, ["--device", "cdua"], "--device must be one that torch can use here, got 'cdua'"),
        (benchmark_precision.main, ["--threads", "-2"], "argument --threads: must be a whole number from 0 to "),
        (benchmark_stream.main, ["--device", "cdua"], "--device must be one that torch can use here, got 'cdua'"),
        (benchmark_stream.main, ["--engine", "fast"], "argument --engine: invalid choice: 'fast'"),
        (benchmark_speed.main, ["--repeats", "x"], "argument --repeats: must be an integer of at least 1, got 'x'"),
        (
            benchmark_lengths.compare,
            ["--config", "none.yaml", "--seeds", "0"],
            "argument --seeds: must be an integer of at least 1, got '0'",
        ),
    ],
)
def test_mistakes(capsys, main, words, message):
    try:
        status = main(words)
    except SystemExit as stopped:
        status = stopped.code
    error = capsys.readouterr().err
    assert status == 2
    assert message in error.splitlines()[-1]
    if main is benchmark_paging.BENCHMARK.main:  # of all runners
        assert error.count("\n") == 1


@pytest.mark.parametrize("script", [benchmark_speed, benchmark_stream])
def test_the_earlier_name_of_an_engine(script):
    for name in ("reference", "sequential"):
        assert script.parser().parse_args(["--engine", name]).engine == "sequential"
    assert "reference" not in script.parser().format_help()


def test_what_cannot_be_written_is_named(tmp_path, capsys, monkeypatch):
    """A folder in the place of the result: its name and the system's reason, not a traceback."""
    benchmark = benchmark_paging.BENCHMARK
    monkeypatch.setattr(type(benchmark), "session", lambda self, args: (tmp_path / "none" / "x").read_text())
    assert benchmark.main(["--quick"]) == 1
    assert capsys.readouterr().err == f"benchmark_paging.py: {tmp_path}/none/x: No such file or directory\n"
