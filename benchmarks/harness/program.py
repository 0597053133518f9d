"""The command line of every runner, and the output of its results.

A runner ends with

    BENCHMARK = Benchmark("name", __doc__, plan, flags=flags, fields=fields, quick={"steps": 4})
    if __name__ == "__main__":
        sys.exit(BENCHMARK.main())

Exit status: 0 done; 2 bad arguments, or a CSV file of other columns; 130 interrupted (the same command continues).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from titans_pytorch.common.checks import MissingPackage
from titans_pytorch.common.files import write_json
from titans_pytorch.common.threads import choose_threads
from titans_pytorch.training.options import OneLineParser, number

from .arms import Arm, described, digest
from .compare import versus
from .csvfile import OtherSchema, append_rows, check_columns
from .environment import REPOSITORY, commit, run_record
from .figures import draw
from .later import torch
from .plots import check_drawing
from .report import csv_rows, show
from .session import Session, with_controls
from .store import Finished
from .task import TEST_BATCHES, Setting, Task

SCHEMA = 1  # schema of the common part of every result file
UNFINISHED = Path("runs/unfinished")
# flags that do not change a result
APART = {"seeds", "output_json", "output_csv", "output_png", "tag", "repeats", "fresh", "threads"}


@dataclass(frozen=True)
class Plan:
    """The plan of a run: every arm, with its controls, on every task.

    timed: the task on which times are taken. versus: pairs of arms to compare with each other, in the judged metrics.
    settings: task name -> its own Setting, in place of the command line's.
    """

    tasks: Sequence[Task]
    arms: Sequence[Arm]
    timed: Task | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # for the result file, from a search
    versus: Sequence[tuple[str, str]] = ()
    settings: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """A runner.

    name: name of the result; the script is benchmark_NAME.py. about: the module's docstring, its first line the --help.
    plan(args, session): tasks and arms; a search measures candidates on session.selection_seeds(n) here.
    flags(parser): adds the runner's own flags. fields(result, args): more top-level entries of the result file.
    lines(result): further lines to print. picture(result, path): draws --output-png.
    quick: defaults of flags under --quick. steps, lr: defaults of the common flags.
    schema: raise it when the meaning of `fields` changes.
    """

    name: str
    about: str
    plan: Callable[[argparse.Namespace, Session], Plan]
    flags: Callable[[argparse.ArgumentParser], None] | None = None
    fields: Callable[[dict[str, Any], argparse.Namespace], Mapping[str, Any]] | None = None
    lines: Callable[[Mapping[str, Any]], Iterable[str]] | None = None
    quick: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 150
    lr: float = 1e-2
    schema: int = 1
    script: str | None = None
    picture: Callable[[Mapping[str, Any], str], None] = draw

    def parser(self) -> argparse.ArgumentParser:
        about, _, rest = (self.about or "").strip().partition("\n")
        p = OneLineParser(f"benchmark_{self.name}.py", about, epilog=rest, allow_abbrev=True, threads=True)
        if self.flags is not None:
            self.flags(p)
        common = p.add_argument_group("common")
        common.add_argument("--seeds", type=whole(1), default=5, metavar="N", help="number of seeds (default 5)")
        common.add_argument("--seed", type=whole(0), default=0, help="the first seed (default 0)")
        own = {option for action in p._actions for option in action.option_strings}
        if "--steps" not in own:
            common.add_argument(
                "--steps", type=whole(0), default=self.steps, help="training steps of the slow parameters"
            )
        common.add_argument("--lr", type=float, default=self.lr, help="learning rate of the slow parameters")
        common.add_argument("--test-batches", type=whole(1), default=TEST_BATCHES, help="batches of held-out data")
        common.add_argument("--repeats", type=whole(0), default=5, help="timed calls after warm-up (0: no times)")
        common.add_argument("--device", default="cpu", help="cpu or cuda")
        common.add_argument("--tag", default=self.name, help="a label for the result files")
        common.add_argument("--quick", action="store_true", help="a run of seconds that shows that the script works")
        common.add_argument("--fresh", action="store_true", help="do not continue an interrupted run")
        common.add_argument("--output-json", metavar="FILE")
        common.add_argument("--output-csv", metavar="FILE", help="rows are appended")
        common.add_argument("--output-png", metavar="FILE")
        return p

    def main(self, argv: Sequence[str] | None = None) -> int:
        parser = self.parser()
        argv = sys.argv[1:] if argv is None else list(argv)
        if parser.parse_args(argv).quick:
            parser.set_defaults(**{"seeds": 2, "repeats": 1, "test_batches": 1, **self.quick})
        args = parser.parse_args(argv)
        try:
            return self.run(args, argv)
        except (OtherSchema, UsageError) as error:
            print(f"{parser.prog}: {error}", file=sys.stderr)
            return 2
        except (MissingPackage, OSError) as error:
            from titans_pytorch.training.run import in_a_line

            print(f"{parser.prog}: {in_a_line(error)}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"\n{parser.prog}: interrupted; the same command continues from here", file=sys.stderr)
            return 130

    def run(self, args: argparse.Namespace, argv: Sequence[str]) -> int:
        checked_device(args.device)
        if args.output_csv:
            check_columns(args.output_csv)
        if args.output_png:
            check_drawing()  # fail before anything is measured
        choose_threads(args.threads, getattr(args, "dim", None))
        session = self.session(args)
        try:
            plan = self.plan(args, session)
        except ValueError as error:
            raise UsageError(error) from error
        result = self.result(args, argv, session, plan)
        show(result)
        if self.lines is not None:
            print("\n".join(self.lines(result)))
        if args.output_json:
            write_json(args.output_json, result)
        if args.output_csv:
            append_rows(args.output_csv, csv_rows(result))
        if args.output_png:
            self.picture(result, args.output_png)
        session.finished.close()
        return 0

    def session(self, args: argparse.Namespace) -> Session:
        code = code_version()
        kept = {k: v for k, v in vars(args).items() if k not in APART}
        path = UNFINISHED / f"{self.name}-{digest({**kept, 'code': code})}.jsonl"
        if args.fresh:
            path.unlink(missing_ok=True)
        finished = Finished(path)
        if len(finished):
            print(f"continues an interrupted run: {len(finished)} results of {path}", file=sys.stderr)
        setting = Setting(args.steps, args.lr, args.device, args.test_batches)
        return Session(range(args.seed, args.seed + args.seeds), setting, finished, code)

    def result(self, args, argv: Sequence[str], session: Session, plan: Plan) -> dict[str, Any]:
        tasks = {t.name: session.compare(t, plan.arms, plan.settings.get(t.name)) for t in plan.tasks}
        timed = plan.timed or plan.tasks[0]
        times = session.times(timed, with_controls(plan.arms), args.repeats)
        script = self.script or str(REPOSITORY / "benchmarks" / f"benchmark_{self.name}.py")
        run = run_record(vars(args), list(session.seeds), args.device, torch.get_num_threads(), [script, *argv])
        apart = APART - {"seeds"}
        result = {
            "benchmark": self.name,
            "schema": f"{SCHEMA}.{self.schema}",
            "timestamp_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "tag": args.tag,
            "device": args.device,
            "config": {k: described(v) for k, v in vars(args).items() if k not in apart},
            "run": run,
            "tasks": tasks,
            "versus": [line for name, task in tasks.items() for line in versus(name, task, plan.versus)],
            "timing": {"task": timed.name, "repeats": args.repeats, "arms": times},
            **plan.extra,
        }
        return {**result, **(self.fields(result, args) if self.fields else {})}


class UsageError(Exception):
    """A wrong command line: one line for the user."""


def whole(least: int) -> Callable[[str], int]:
    return number(int, f"an integer of at least {least}", lambda value: value >= least)


ENGINES = ("auto", "solve", "dual", "matrix", "sequential")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add --engine, the engine of our memories. "reference", an earlier name of "sequential", is accepted."""
    parser.add_argument(
        "--engine",
        default="auto",
        type=lambda name: "sequential" if name == "reference" else name,
        choices=ENGINES,
        help="engine of our memory",
    )


def numbers(text: str) -> list[float]:
    """Parse a flag's comma-separated numbers, in order and without repeats."""
    try:
        return sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between, got {text!r}") from None


def checked_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise UsageError(f"--device must be one that torch can use here, got {device!r} ({first[:120]})") from error


def code_version() -> str | None:
    """Identify the code: the commit and its local changes. Results of other code are never continued."""
    head = commit()
    if head is None or not head.endswith("+changes"):
        return head
    changes = subprocess.run(["git", "diff", "HEAD"], cwd=REPOSITORY, capture_output=True, timeout=60).stdout
    return f"{head} {digest(changes.decode(errors='replace'))}"
