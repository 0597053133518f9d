"""A budget for switching pages: a penalty with a gradient, and what the budget runners share.

A page is switched where the complexity c of a switch window exceeds the threshold: s is 1 or 0. Its gradient is that of
p = sigmoid((c - threshold) / temperature), straight through, so that the penalty acts on the counted rate. With p alone
the penalty would be small if all windows stayed just below the threshold. The mean of s is the switch rate. A row
goes on to the next page with s, which gives the pages' shares; their entropy over log(pages) is 1 if all shares are
equal.

    penalty = switch_weight (rate - switch_target)^2 + entropy_weight (entropy - entropy_target)^2

Pages follow each other here (no routing by phase), so the next page is known before the switch.

Letters: b batch, m chunks, w switch windows, p pages.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.arms import Arm
from harness.compare import between
from harness.gates import elementwise, phase, symplectic
from harness.later import torch
from harness.program import whole
from harness.task import Task
from tasks.curves import curve_tasks

if TYPE_CHECKING:
    from harness.switches import Call

QUORUM = {"quorum_mix": 0.75, "quorum_window": 5, "quorum_threshold": 0.25, "quorum_temperature": 0.1}


@dataclass(frozen=True)
class SwitchBudget:
    """The penalty, for an Arm. A target of None leaves its part out. temperature: in units of complexity; the gradient
    reaches windows that lie within a few of it from the threshold."""

    switch_target: float | None
    switch_weight: float
    entropy_target: float | None = None
    entropy_weight: float = 0.0
    temperature: float = 0.1

    def __call__(self, model: torch.nn.Module, calls: Sequence[Call]) -> torch.Tensor:
        soft = [soft_switches(call, self.temperature) for call in calls]
        rate = torch.cat([s.flatten() for s in soft]).mean()
        out = rate.new_zeros(())
        if self.switch_target is not None:
            out = out + self.switch_weight * (rate - self.switch_target).square()
        if self.entropy_target is not None:
            shares = torch.stack([page_shares(call, s) for call, s in zip(calls, soft, strict=True)]).mean(dim=0)
            out = out + self.entropy_weight * (entropy(shares) - self.entropy_target).square()
        return out

    def of(self, rate: float, shares: Sequence[float]) -> float:
        """Return the penalty of a counted rate and counted shares."""
        found = 0.0
        if self.switch_target is not None:
            found += self.switch_weight * (rate - self.switch_target) ** 2
        if self.entropy_target is not None:
            found += self.entropy_weight * (entropy(torch.tensor(shares)).item() - self.entropy_target) ** 2
        return found


def soft_switches(call: Call, temperature: float) -> torch.Tensor:
    """Return [b w]: 1 where the window's complexity exceeds the threshold, else 0, with the gradient of a sigmoid."""
    highest = [call.complexity[:, call.windows == w].amax(dim=-1) for w in call.windows.unique()]
    excess = torch.stack(highest, dim=1) - call.memory.symplectic_page_threshold
    soft = (excess / temperature).sigmoid()
    return (excess > 0).to(soft.dtype) + soft - soft.detach()


def page_shares(call: Call, switches: torch.Tensor) -> torch.Tensor:
    """Return the share of the windows in which each page is written: [b w] -> [p]."""
    pages = call.memory.num_pages
    before = (call.page[:, 0] - call.switched[:, 0].long()) % pages
    on, seen = torch.nn.functional.one_hot(before, pages).to(switches.dtype), []
    for s in switches.unbind(dim=1):
        on = (1 - s[:, None]) * on + s[:, None] * on.roll(1, dims=1)
        seen.append(on)
    return torch.stack(seen).mean(dim=(0, 1))


def entropy(shares: torch.Tensor) -> torch.Tensor:
    """Return the entropy of shares [p] that sum to 1, over log(p): in [0, 1]."""
    return -torch.special.xlogy(shares, shares.clamp(min=1e-12)).sum() / math.log(len(shares))


# arms, tasks and fields


def flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--dim", type=whole(8), default=16)
    p.add_argument("--seq-len", type=whole(8), default=48, help="tokens of a curve")
    p.add_argument("--batch-size", type=whole(1), default=8)
    p.add_argument("--chunk-size", type=whole(1), default=8)
    p.add_argument("--pages", type=whole(2), default=4)
    p.add_argument("--switch-weight", type=float, default=1.0)
    p.add_argument("--entropy-weight", type=float, default=0.1)
    p.add_argument(
        "--temperature", type=float, default=0.1, help="temperature of soft switches, in units of complexity"
    )
    p.add_argument("--carry-state", action="store_true", help="carry the memory from each batch to the next")


def tasks(args: argparse.Namespace) -> list[Task]:
    shared = {"dim": args.dim, "batch_size": args.batch_size, "chunk_size": args.chunk_size}
    return curve_tasks(length=args.seq_len, carry=args.carry_state, **shared)


def memory(args: argparse.Namespace, threshold: float, ratio: float | None) -> dict[str, Any]:
    """Return the keywords of a paged memory whose quorum has a budget."""
    gate = {**elementwise(), **phase(args.dim, 0.5), **QUORUM}
    if ratio is not None:
        gate |= {"budget_topk_ratio": ratio, "budget_window": max(16, args.chunk_size)}
    return {**symplectic(**gate), "num_pages": args.pages, "symplectic_page_threshold": threshold}


def pair(args: argparse.Namespace, threshold: float, ratio: float | None, budget: SwitchBudget) -> tuple[Arm, Arm]:
    """Return the arms (unconstrained, constrained)."""
    keywords = memory(args, threshold, ratio)
    return (
        Arm("unconstrained", keywords, "no penalty"),
        Arm("constrained", keywords, "the penalty in training", penalty=budget),
    )


def arm_fields(result: Mapping[str, Any], task: str, arm: str, budget: SwitchBudget) -> dict[str, Any]:
    """recon_loss: error on held-out data; penalty: computed from the counts there, whether or not the arm was
    trained with it.
    """
    record = result["tasks"][task]["arms"][arm]
    main = result["tasks"][task]["metrics"][0]["name"]
    recon, pages = record["metrics"][main]["mean"], record["pages"]
    penalty = budget.of(pages["switch_rate"], pages["occupancy"])
    return {
        "recon_loss": recon,
        "total_loss": recon + penalty,
        "penalty": penalty,
        "switch_rate": pages["switch_rate"],
        "entropy": entropy(torch.tensor(pages["occupancy"])).item(),
        "step_ms": result["timing"]["arms"].get(arm, {}).get("train_ms"),
    }


def nearer(result: Mapping[str, Any], arm: str, other: str, budget: SwitchBudget) -> list[dict[str, Any]]:
    """Judge on each task whether the arm's switch rate is nearer to the target than the other's."""
    out = []
    for name, task in result["tasks"].items():
        rates = (task["arms"][a]["pages"]["switch_rates"] for a in (arm, other))
        distances = ([abs(rate - budget.switch_target) for rate in each] for each in rates)
        out.append(between(f"{name}, switch rate's distance to {budget.switch_target:g}", arm, other, *distances))
    return out


def mean_of(found: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.fmean(f[key] for f in found)
