"""How exact is every engine in float64, float32 and under bfloat16 autocast, against the sequential engine in float64?

python benchmarks/benchmark_precision.py                                    # a minute on one core
python benchmarks/benchmark_precision.py --cases readme --tokens 1024 --output-json runs/precision.json
python benchmarks/benchmark_precision.py --quick

The named memories of benchmark_speed.py, parameters moved off their start values, on one sequence. Errors are the
largest difference over the largest expected value, of the output and of the input's gradient. If the sequential engine
has the same error in float32, the rule amplifies rounding, not an engine.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from harness.environment import run_record
from harness.later import torch
from harness.program import UsageError, checked_device
from harness.tables import table
from speed.cases import NAMED, Case
from tqdm import tqdm

from titans_pytorch.common.files import write_json
from titans_pytorch.common.threads import choose_threads
from titans_pytorch.training.options import OneLineParser

SCHEMA = 1
ENGINES = ("auto", "dual", "matrix", "reference")
DTYPES = ("float64", "float32", "bfloat16")
CASES = {case.name: case for case in NAMED if case.kind == "memory"}


def measure(case: Case, tokens: int, seed: int, device: str) -> dict[str, dict[str, dict[str, float]]]:
    """Measure a case: engine -> dtype -> errors."""
    from speed import gate
    from speed.arms import Setup, build_module, inputs

    tokens = min(tokens, case.tokens) // case.chunk * case.chunk
    given = case.as_dict()
    exact = Setup(device, "float64", seed, "reference")
    reference = gate.randomise(build_module(given, exact), seed)
    x = inputs(given, replace(exact, dtype="float32"), 1, tokens).to(exact.parameter_dtype)
    wanted = gate.answer(reference, given, x)
    out = {}
    for engine in ENGINES:
        if engine == "dual" and case.kwargs.get("spectral_norm_surprises"):
            continue  # the rule needs built updates
        for dtype in DTYPES:
            setup = replace(exact, dtype=dtype, engine=engine)
            module = build_module(given, setup)
            module.load_state_dict(reference.state_dict())
            with setup.autocast():
                got = gate.answer(module, given, x.to(setup.parameter_dtype))
            errors = gate.errors({k: v.to(x.dtype) for k, v in got.items()}, wanted)
            out.setdefault(engine, {})[dtype] = errors
    return out


def report(results: dict) -> str:
    header = ["case", "engine", *(f"{d} {what}" for d in DTYPES for what in ("output", "gradient"))]
    rows = []
    for name, engines in results.items():
        for engine, dtypes in engines.items():
            numbers = [f"{dtypes[d][what]:.0e}" for d in DTYPES for what in ("output", "gradient")]
            rows.append([name, engine, *numbers])
            name = ""
    return table(header, rows, left=2)


def main(argv: list[str] | None = None) -> int:
    p = OneLineParser(description=__doc__, threads=True)
    p.add_argument(
        "--cases", nargs="+", choices=tuple(CASES), default=list(CASES), help="names of cases (default: all)"
    )
    p.add_argument("--tokens", type=int, default=512, help="largest number of tokens (default: 512)")
    p.add_argument("--quick", action="store_true", help="one case, 64 tokens")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output-json", metavar="FILE", help="JSON file of every number and the command")
    args = p.parse_args(argv)
    if args.tokens < 64:
        p.error(f"--tokens must be 64 or more, got {args.tokens}")
    try:
        checked_device(args.device)
    except UsageError as error:
        p.error(str(error))
    names, tokens = (["train-mac-memory"], 64) if args.quick else (args.cases, args.tokens)
    choose_threads(args.threads, max(CASES[name].kwargs["dim"] for name in names))
    results = {name: measure(CASES[name], tokens, args.seed, args.device) for name in tqdm(names, disable=None)}
    print(report(results))
    if args.output_json:
        config = {"cases": names, "tokens": tokens, "engines": ENGINES, "dtypes": DTYPES}
        record = run_record(config, [args.seed], args.device, torch.get_num_threads(), argv)
        write_json(args.output_json, {"schema": SCHEMA, "run": record, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
