"""Is a result worse than its baseline? For benchmark_symplectic and benchmark_codebook_transfer.

python benchmarks/check_regression.py --baseline benchmarks/results/symplectic_baseline.json --latest FILE

Schema, configuration (seeds among it) and device type must be the same, else nothing is compared. A metric of an arm
passes while its mean over the seeds is worse by no more than two sets of seeds would differ by chance: the 99 % point
of Student's t times sd * sqrt(2 / n), the spread sd being the one in the baseline. The --max-* flags widen this
to a share of the baseline, and never narrow it. Times are compared where both results come from the same machine class
and number of threads, with three or more timed calls; their spread is the range of the baseline's calls.

Exit status: 0 passed; 1 worse; 2 bad arguments, or a file that cannot be read; 3 not comparable.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from regression.comparable import NotComparable, check_comparable, times_differ
from regression.metrics import Check, codebook_checks, symplectic_checks, time_checks
from regression.records import Unreadable, read
from regression.report import show

from titans_pytorch.training.options import OneLineParser


def parser() -> argparse.ArgumentParser:
    about, _, rest = __doc__.partition("\n")
    p = OneLineParser("check_regression.py", about, epilog=rest)
    p.add_argument("--baseline", required=True, metavar="FILE", help="baseline result of benchmark_symplectic")
    p.add_argument("--latest", required=True, metavar="FILE")
    p.add_argument("--codebook-baseline", metavar="FILE", help="baseline result of benchmark_codebook_transfer")
    p.add_argument("--codebook-latest", metavar="FILE")
    p.add_argument("--max-loss-regression-pct", type=percentage, default=5.0, metavar="PCT", help="default 5")
    p.add_argument("--max-time-regression-pct", type=percentage, default=10.0, metavar="PCT", help="default 10")
    p.add_argument("--min-gain-regression-pct", type=percentage, default=5.0, metavar="PCT", help="default 5")
    return p


def percentage(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of percent, 0 or more, got {text!r}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if (args.codebook_baseline is None) != (args.codebook_latest is None):
        p.error("--codebook-baseline, --codebook-latest: takes both or neither")
    try:
        pairs = [("symplectic", read(args.baseline), read(args.latest))]
        if args.codebook_baseline is not None:
            pairs.append(("codebook_transfer", read(args.codebook_baseline), read(args.codebook_latest)))
        for benchmark, baseline, latest in pairs:
            check_comparable(benchmark, baseline, latest)
        checks = [check for pair in pairs for check in checks_of(args, *pair)]
    except Unreadable as error:
        print(f"{p.prog}: {error}", file=sys.stderr)
        return 2
    except NotComparable as error:
        print(f"{p.prog}: not comparable: {error}", file=sys.stderr)
        return 3
    return show(checks)


def checks_of(
    args: argparse.Namespace, benchmark: str, baseline: Mapping[str, Any], latest: Mapping[str, Any]
) -> list[Check]:
    shares = {
        "lower": args.max_loss_regression_pct / 100,
        "higher": args.min_gain_regression_pct / 100,
        "time": args.max_time_regression_pct / 100,
    }
    quality = {"symplectic": symplectic_checks, "codebook_transfer": codebook_checks}[benchmark]
    checks = quality(baseline, latest, shares)
    reason = times_differ(baseline, latest)
    if reason is not None:
        print(f"{benchmark}: times are not compared: {reason}")
        return checks
    return checks + time_checks(benchmark, baseline, latest, shares)


if __name__ == "__main__":
    sys.exit(main())
