"""How fast, and in how much memory: this library, titans-pytorch 0.5.5 (the peer) and full attention, side by side.

python benchmarks/benchmark_speed.py --quick                                   # seconds: shows that it runs
python benchmarks/benchmark_speed.py --peer peer/bin/python \\
    --output-json runs/speed.json --output-png runs/speed.png                  # everything; hours with the peer
python benchmarks/benchmark_speed.py --cases readme paper-rule --repeats 3     # some of it
python benchmarks/benchmark_speed.py --cases sweep --lengths 256 4096 --chunks 4 64

The peer has our import name, so it lives in an environment of its own:
python -m venv peer && peer/bin/pip install torch titans-pytorch==0.5.5

Every arm runs in a process of its own, and they take turns, so that a noisy machine hits all of them. Measured are
forward (no gradients), train (forward and backward), memory (the most that a training step takes over idle, in a fresh
process: resident set, on CUDA torch's allocator) and decode (tokens one at a time). Reported is the best of all calls;
the result file has every call. Nothing is timed before its output was compared with the sequential engine's and with
the peer's (speed/gate.py). "of matmul": the operations that the algorithm needs (harness/operations.py) per second, as
a
share of the rate of a large matrix product in the same process.

The result file is written after each case, and the same command continues an interrupted run: its cases, if
measured in the same way and without failures of ours, are kept (--fresh measures them again).

On a shared machine, --threads 1 is steadier: threads that wait for each other also wait for other processes. With
--clock process the time of other processes is not counted.

Exit status: 0, even if goals are missed or the peer fails; 1 if ours fails or its output is wrong; 2 for bad arguments.
"""

import argparse
import json
import sys
from dataclasses import asdict

from harness.environment import run_record
from harness.program import add_engine, whole
from harness.resident import available_memory
from harness.timing import CLOCKS, DTYPES
from harness.workers import WorkerFailure
from speed.cases import DEFAULT_CHUNKS, DEFAULT_LENGTHS, QUANTITIES, Case, choose_cases, shortened
from speed.measure import Arm, Options, default_arms, describe, measure_case, steps
from speed.report import failures, judge, report
from tqdm import tqdm

from titans_pytorch.common.files import read_json, write_json
from titans_pytorch.common.threads import NARROW
from titans_pytorch.training.options import OneLineParser

SCHEMA = 1
QUICK = {"cases": ["train-mac-memory", "cached-sampling", "sweep"], "lengths": [128], "chunks": [16]}
QUICK_TOKENS = 128


def parser() -> argparse.ArgumentParser:
    p = OneLineParser(description=__doc__)
    p.add_argument("--peer", metavar="PYTHON", help="python of an environment that holds titans-pytorch 0.5.5")
    p.add_argument("--cases", nargs="+", metavar="NAME", help="named, sweep, or names of cases (default: named sweep)")
    p.add_argument(
        "--lengths", nargs="+", type=positive, help=f"lengths of the sweep (default: {numbers(DEFAULT_LENGTHS)})"
    )
    p.add_argument(
        "--chunks", nargs="+", type=positive, help=f"chunk sizes of the sweep (default: {numbers(DEFAULT_CHUNKS)})"
    )
    p.add_argument(
        "--quantities", nargs="+", choices=QUANTITIES, default=list(QUANTITIES), help="quantities to measure"
    )
    p.add_argument("--quick", action="store_true", help="a few cases at a hundred tokens, once, without goals")
    p.add_argument("--repeats", type=positive, help="turns of each arm (default: 5)")
    p.add_argument("--min-seconds", type=float, help="shortest time of a turn, filled with calls (default: 0.2)")
    p.add_argument("--timeout", type=float, default=900, help="seconds that an arm may take for one case")
    p.add_argument(
        "--memory-limit", type=float, metavar="GB", help="an arm may ask for (default: 90%% of what is free)"
    )
    add_engine(p)
    p.add_argument("--threads", type=positive, help="CPU threads of each arm (default: see docs/threads.md)")
    p.add_argument("--clock", default="wall", choices=CLOCKS, help="process: CPU time, with --threads 1")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--dtype", default="float32", choices=DTYPES, help="bfloat16 is autocast")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--fresh", action="store_true", help="measure everything again, whatever an earlier --output-json holds"
    )
    p.add_argument("--output-json", metavar="FILE", help="JSON file of every number and the command")
    p.add_argument("--output-png", metavar="FILE")
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser()
    args = arguments.parse_args(argv)
    quick = QUICK if args.quick else {}
    try:
        cases = choose_cases(
            args.cases or quick.get("cases"),
            args.lengths or quick.get("lengths", DEFAULT_LENGTHS),
            args.chunks or quick.get("chunks", DEFAULT_CHUNKS),
        )
    except ValueError as error:
        arguments.error(str(error))
    if args.threads is None and max(case.kwargs["dim"] for case in cases) < NARROW:
        args.threads = 1
    if args.clock == "process" and (args.threads != 1 or args.device != "cpu"):
        arguments.error("clock: process counts the time of one thread on a CPU, takes --threads 1 --device cpu")
    if args.quick:
        cases = [shortened(case, QUICK_TOKENS) for case in cases]
    options = options_of(args)
    arms = default_arms(args.peer)
    try:
        check_arms(arms, cases[0], options)
    except (OSError, WorkerFailure, ValueError) as error:
        arguments.error(str(error))

    configuration = {**vars(args), "cases": [case.name for case in cases], "memory_limit": options.memory_limit}
    shown = {args.peer: "PEER_PYTHON"} if args.peer else {}
    command = None if argv is None else [__file__, *argv]
    run = run_record(configuration, [args.seed], args.device, arms[0].description["threads"], command, shown)
    result = {
        "benchmark": "speed",
        "schema": SCHEMA,
        "run": run,
        "options": asdict(options),
        "complete": False,
        "cases": [],
    }
    result["arms"] = {arm.name: arm.description for arm in arms}
    if args.output_json and not args.fresh:
        result["cases"] = kept_cases(args.output_json, result, cases)
    interrupted = measure_all(cases, arms, options, result, args.output_json)
    if args.output_json and not interrupted:
        write_json(args.output_json, {**result, "complete": True})

    print(report(result["cases"]))
    if args.output_png:
        save_figure(result, args.output_png)
    if interrupted:
        return 130
    return 1 if failures(result["cases"]) else 0


def measure_all(cases: list[Case], arms: list[Arm], options: Options, result: dict, output: str | None) -> bool:
    """Fill result["cases"], and write the file after each. Returns whether it was interrupted; measured cases stay."""
    kept = {record["name"] for record in result["cases"]}
    cases = [case for case in cases if case.name not in kept]
    total = sum(steps(case, arms, options) for case in cases)
    done = 0
    with tqdm(total=total, file=sys.stderr, unit="step", disable=None) as bar:
        for case in cases:

            def step(text, case=case):
                bar.set_description(f"{case.name}: {text}")
                bar.update()

            try:
                result["cases"].append(judge(measure_case(case, arms, options, step)))
            except KeyboardInterrupt:
                return True
            if output:
                write_json(output, result)
            done += steps(case, arms, options)
            bar.update(done - bar.n)
    return False


def kept_cases(path: str, result: dict, cases: list[Case]) -> list[dict]:
    """Return the records of an earlier, interrupted run with the same options, arms, versions and threads."""
    try:
        earlier = read_json(path)
        if earlier.get("complete") or how_measured(earlier) != how_measured(result):
            return []
        wanted = {case.name: json.loads(json.dumps(case.as_dict())) for case in cases}
        return [r for r in earlier["cases"] if wanted.get(r["name"]) == r["case"] and not failures([r])]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def how_measured(result: dict) -> str:
    """Return the settings that all records of one file share; limits on time and memory may differ."""
    options = {k: v for k, v in result["options"].items() if k not in ("timeout", "memory_limit")}
    run = {k: result["run"][k] for k in ("versions", "device", "threads")}
    return json.dumps([result["schema"], options, result["arms"], run], sort_keys=True)


def options_of(args: argparse.Namespace) -> Options:
    limit = None
    if args.memory_limit is not None:
        limit = int(args.memory_limit * 1e9)
    elif args.device == "cpu" and (free := available_memory()) is not None:
        limit = int(0.9 * free)
    return Options(
        setup={name: getattr(args, name) for name in ("device", "dtype", "seed", "engine", "clock")},
        threads=args.threads,
        repeats=args.repeats or (1 if args.quick else 5),
        timeout=args.timeout,
        min_seconds=args.min_seconds if args.min_seconds is not None else (0.0 if args.quick else 0.2),
        memory_limit=limit,
        quantities=tuple(q for q in QUANTITIES if q in args.quantities),
    )


def check_arms(arms: list[Arm], case: Case, options: Options) -> None:
    """Fill the arms' descriptions. ValueError if the peer's environment holds this library instead."""
    for arm in arms:
        if arm.name == "attention":  # attention runs in the environment of ours
            arm.description = arms[0].description
            continue
        try:
            describe(arm, case, options)
        except WorkerFailure as failure:
            raise ValueError(f"{arm.name}: {arm.python} does not serve: {failure}") from None
        except OSError as error:
            raise ValueError(f"{arm.name}: cannot run {arm.python}: {error}") from None
        if arm.name == "peer" and arm.description["is_ours"]:
            raise ValueError(
                f"peer must be one with titans-pytorch 0.5.5, got {arm.python}, whose titans_pytorch is this one"
            )


def save_figure(result: dict, path: str) -> None:
    from speed.figure import draw

    run, setup = result["run"], result["options"]["setup"]
    where = f"{run['device']['name']}, {run['threads']} thread(s), {setup['dtype']}, torch {run['versions']['torch']}"
    where += {"wall": "", "process": ", CPU time"}[setup["clock"]]
    if not draw(result["cases"], path, where):
        print("nothing to draw", file=sys.stderr)


positive = whole(1)


def numbers(values) -> str:
    return " ".join(str(v) for v in values)


if __name__ == "__main__":
    sys.exit(main())
