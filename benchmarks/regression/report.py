"""The checks as a table, and the exit status."""

from collections.abc import Sequence

from harness.tables import table

from .metrics import Check


def show(checks: Sequence[Check]) -> int:
    rows = [
        (c.name, f"{c.baseline:.5g}", f"{c.latest:.5g}", f"{c.worse:+.3g}", f"{c.tolerance:.3g}", verdict(c))
        for c in checks
    ]
    print(table(("metric", "baseline", "latest", "worse by", "tolerance", ""), rows))
    failed = [c.name for c in checks if not c.passed]
    if failed:
        print(f"REGRESSION: {len(failed)} of {len(checks)}: {', '.join(failed)}")
        return 1
    print(f"passed: {len(checks)} metrics")
    return 0


def verdict(check: Check) -> str:
    return "PASS" if check.passed else "FAIL"
