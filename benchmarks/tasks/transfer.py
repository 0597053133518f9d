"""Shared code of transfer runners: two tasks, their flags, and a score over both.

long_horizon: a curve returns after another one (curves.Recovery). interference: two tasks with
the same keys (interference.Interference). The score, lower is better, is computed seed by seed:

    clean_mse_post + 0.5 phase_err_post + post_a_loss

A better score on A at the cost of B is no gain: a verdict "better" also reports error_b, and an arm that is worse in it
does not win. Time is not part of the score; `--latency-weight` adds a separate term.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from harness.arms import Arm
from harness.compare import advantage, between, qualified
from harness.program import Plan, whole
from harness.session import Session
from harness.statistics import paired, spread
from harness.task import Setting, Task

from tasks.curves import Recovery
from tasks.interference import Interference

LONG, INTERFERENCE = "long_horizon", "interference"
WEIGHTS = ((LONG, "clean_mse_post", 1.0), (LONG, "phase_err_post", 0.5), (INTERFERENCE, "error_a_after", 1.0))
LONG_STEPS = ("long_warmup_steps", "long_perturb_steps", "long_recovery_steps")
QUICK = {"steps": 3, "batch_size": 4}
NAMES = {
    "pre_a_loss": "error_a_before",
    "post_a_loss": "error_a_after",
    "post_b_loss": "error_b",
    "forgetting_delta": "forgetting",
}


def flags(p: argparse.ArgumentParser, pages: int = 2) -> None:
    """Add the flags of memories and tasks."""
    p.add_argument("--dim", type=whole(4), default=32, help="features of a token (even)")
    p.add_argument("--seq-len", type=whole(5), default=8, help="tokens of one write, 4 of them context")
    p.add_argument("--batch-size", type=whole(1), default=8)
    p.add_argument("--chunk-size", type=whole(1), default=8)
    p.add_argument("--pages", type=whole(1), default=pages)
    p.add_argument(
        "--long-seq-len", type=whole(12), default=48, help="tokens of the three parts of a recovery together"
    )
    p.add_argument(
        "--latency-weight",
        type=float,
        default=0.0,
        help="penalty per millisecond of a training step, reported separately",
    )


def paging_flags(p: argparse.ArgumentParser) -> None:
    """Add `flags`, the switch rate, and `phase_flags`."""
    flags(p)
    p.add_argument(
        "--switch-rate", type=float, default=0.5, help="switch rate that the thresholds are set for, per opportunity"
    )
    phase_flags(p)


def phase_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags for the training steps of each task, and for the tests of interference."""
    p.add_argument("--interference-steps", type=whole(0), help="training steps on interference (default: --steps)")
    p.add_argument(
        "--interference-eval-iters", type=whole(1), help="test batches of interference (default: --test-batches)"
    )
    long_flags(p)


def long_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags for the training steps of a recovery."""
    for name in LONG_STEPS:
        about = "training steps on the long horizon: the three are added up, a step sees all parts (default: --steps)"
        p.add_argument(f"--{name.replace('_', '-')}", type=whole(0), help=about)


def settings(args: argparse.Namespace, common: Setting) -> dict[str, Setting]:
    """Return the Setting of each task from `phase_flags`."""
    short = common.steps if args.interference_steps is None else args.interference_steps
    batches = args.interference_eval_iters or common.test_batches
    return {LONG: long_setting(args, common), INTERFERENCE: replace(common, steps=short, test_batches=batches)}


def long_setting(args: argparse.Namespace, common: Setting) -> Setting:
    """Return the Setting from `long_flags`."""
    given = [getattr(args, name) for name in LONG_STEPS]
    return common if all(n is None for n in given) else replace(common, steps=sum(n or 0 for n in given))


def planner(
    arms: Callable[[argparse.Namespace], Sequence[Arm]], versus: Sequence[tuple[str, str]]
) -> Callable[[argparse.Namespace, Session], Plan]:
    """Return the plan of a runner with `paging_flags`, from a function that makes its arms."""

    def plan(args: argparse.Namespace, session: Session) -> Plan:
        return Plan(tasks(args), arms(args), versus=versus, settings=settings(args, session.setting))

    return plan


def tasks(args: argparse.Namespace) -> list[Task]:
    shared = {"dim": args.dim, "batch_size": args.batch_size, "chunk_size": args.chunk_size}
    return [Recovery(LONG, length=args.long_seq_len // 3, **shared), Interference(pairs=args.seq_len - 4, **shared)]


def scores(outcomes: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[float]:
    """Return the score of each seed. outcomes: task name -> results of Task.run for each seed."""
    seeds = range(len(outcomes[LONG]))
    return [sum(w * outcomes[task][i]["metrics"][metric] for task, metric, w in WEIGHTS) for i in seeds]


def scores_of(result: Mapping[str, Any], arm: str) -> list[float]:
    """Return the score of each seed from a result file."""
    values = {(t, m): result["tasks"][t]["arms"][arm]["metrics"][m]["values"] for t, m, _ in WEIGHTS}
    return [sum(w * values[t, m][i] for t, m, w in WEIGHTS) for i in range(len(result["run"]["seeds"]))]


def variant(result: Mapping[str, Any], arm: str, args: argparse.Namespace) -> dict[str, Any]:
    """Summarise an arm for a result file: means on both tasks, transfer_score, and its gain over the best control."""
    of_long, of_pairs = (result["tasks"][task]["arms"][arm] for task in (LONG, INTERFERENCE))
    mine = scores_of(result, arm)
    found = {
        "description": of_long["about"],
        "long_horizon": {name: got["mean"] for name, got in of_long["metrics"].items()},
        "interference": {ours: of_pairs["metrics"][theirs]["mean"] for ours, theirs in NAMES.items()},
        "transfer_score": sum(mine) / len(mine),
        "transfer_score_spread": asdict(spread(mine)),
    }
    gains = {control: gain(result, arm, control) for control in of_long["controls"]}
    if gains:
        best = min(gains, key=lambda name: gains[name]["mean"])
        found["transfer_gain"] = {"against": best, **gains[best]}
    times = result["timing"]["arms"].get(arm)
    if times:
        found["long_horizon"]["step_ms"] = times["train_ms"]
        found["latency_term"] = args.latency_weight * times["train_ms"]
    return found


def gain(result: Mapping[str, Any], arm: str, other: str) -> dict[str, Any]:
    """Return how much lower the arm's score is, with the paired 95 % interval."""
    return asdict(paired(scores_of(result, other), scores_of(result, arm)))


def comparison(
    result: Mapping[str, Any], args: argparse.Namespace, versus: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Return the top-level entries of a runner that compares arms: variants, ranking, winner, and verdicts on the score
    of the pairs in `versus` and of each arm against its controls."""
    arms = result["tasks"][LONG]["arms"]
    own = [arm for arm in arms if "/" not in arm]
    variants = {arm: variant(result, arm, args) for arm in arms}
    ranking = sorted(own, key=lambda arm: variants[arm]["transfer_score"])
    controlled = [(arm, control) for arm in own for control in arms[arm]["controls"]]
    lines = [] if refused(result) else [score_line(result, *pair) for pair in (*versus, *controlled)]
    return {
        "variants": variants,
        "ranking": ranking,
        "winner": winner(result, ranking),
        "versus": [*result["versus"], *lines],
    }


def refused(result: Mapping[str, Any]) -> str | None:
    return next((task["refused"] for task in result["tasks"].values() if task["refused"]), None)


def score_line(result: Mapping[str, Any], arm: str, other: str) -> dict[str, Any]:
    line = between("transfer_score", arm, other, scores_of(result, arm), scores_of(result, other))
    of_b = (result["tasks"][INTERFERENCE]["arms"][a]["metrics"]["error_b"]["values"] for a in (arm, other))
    return {**line, "verdict": qualified(line["verdict"], "error_b", advantage(*of_b).side)}


def winner(result: Mapping[str, Any], ranking: Sequence[str]) -> str | None:
    """Return the arm whose score is better than every other arm's, with each interval above zero; else None."""
    first, *others = ranking
    verdicts = [score_line(result, first, other)["verdict"] for other in others]
    won = all(v.startswith("better") and not v.endswith("is worse") for v in verdicts)
    return first if won and not refused(result) else None


def percent(result: Mapping[str, Any], arm: str, other: str) -> dict[str, float]:
    """Return how much lower the arm's means are, in percent of the other's. Verdicts are in `versus`."""
    paths = {
        "long_clean_mse_post_pct": (LONG, "clean_mse_post"),
        "long_phase_err_post_pct": (LONG, "phase_err_post"),
        "interference_post_a_pct": (INTERFERENCE, "error_a_after"),
    }

    def means(name: str) -> dict[str, float]:
        found = {k: result["tasks"][t]["arms"][name]["metrics"][m]["mean"] for k, (t, m) in paths.items()}
        return {**found, "transfer_score_pct": spread(scores_of(result, name)).mean}

    ours, theirs = means(arm), means(other)
    return {k: 100 * (theirs[k] - ours[k]) / abs(theirs[k]) for k in ours}
