"""The switch budget: what it counts is what is counted, its gradient moves the rate to the target, weight 0 does
nothing."""

import math

import pytest
import torch
from budget import SwitchBudget, entropy, nearer, page_shares, soft_switches
from harness.arms import Arm, build
from harness.switches import heard, watched
from harness.task import Setting
from tasks.curves import curve_tasks

TASK = curve_tasks(32, dim=8, batch_size=4, chunk_size=4)[0]
MEMORY = {"use_symplectic_gating": True, "num_pages": 3, "symplectic_page_threshold": 0.3}


def run_of(memory, penalty=None, steps=0, seed=0):
    arm = Arm("a", memory, penalty=penalty)
    return TASK.run(arm, seed, Setting(steps, lr=1e-2, test_batches=4))


def test_shares_and_rate_are_those_that_are_counted():
    model = build(TASK, Arm("a", MEMORY), 0)
    calls = []
    with heard(model, calls.append), watched(model) as seen:
        TASK.loss(model, next(iter(TASK.batches(0, "test", 1))))
    (call,) = calls
    switches = soft_switches(call, 0.1)
    counted = seen.record()
    assert 0.05 < counted["switch_rate"] < 0.95
    assert switches.mean().item() == pytest.approx(counted["switch_rate"])
    assert page_shares(call, switches).tolist() == pytest.approx(counted["occupancy"])
    rate, shares = counted["switch_rate"], counted["occupancy"]
    budget = SwitchBudget(0.5, 2.0, 0.4, 3.0)
    assert budget(model, calls).item() == pytest.approx(budget.of(rate, shares), abs=1e-5)


def test_the_gradient_is_that_of_the_sigmoid():
    model = build(TASK, Arm("a", MEMORY), 0)
    calls = []
    with heard(model, calls.append):
        TASK.loss(model, next(iter(TASK.batches(0, "test", 1))))
    (call,) = calls
    (ours,) = torch.autograd.grad(soft_switches(call, 0.1).sum(), call.complexity, retain_graph=True)
    s = ((call.complexity - 0.3) / 0.1).sigmoid()
    torch.testing.assert_close(ours, s * (1 - s) / 0.1)


def test_entropy():
    assert entropy(torch.full((4,), 0.25)).item() == pytest.approx(1.0)
    assert entropy(torch.tensor([1.0, 0.0, 0.0])).item() == 0.0
    assert entropy(torch.tensor([0.5, 0.5, 0.0, 0.0])).item() == pytest.approx(0.5)
    assert SwitchBudget(0.5, 2.0).of(0.75, [1.0]) == pytest.approx(2.0 / 16)
    assert math.isfinite(SwitchBudget(0.5, 1.0, 0.5, 1.0).of(0.0, [1.0, 0.0]))


@pytest.mark.parametrize(("threshold", "target"), [(0.3, 0.3), (0.65, 0.6)], ids=["down", "up"])
def test_the_rate_is_moved_to_its_target(threshold, target):
    memory = {**MEMORY, "symplectic_page_threshold": threshold}
    free = run_of(memory, steps=30)["pages"]["switch_rate"]
    bound = run_of(memory, SwitchBudget(target, 5.0), steps=30)["pages"]["switch_rate"]
    assert abs(free - target) > 0.35
    assert abs(bound - target) < 0.15


def test_without_weight_nothing_changes():
    free, bound = run_of(MEMORY, steps=4), run_of(MEMORY, SwitchBudget(0.9, 0.0, 0.9, 0.0), steps=4)
    assert free["metrics"] == bound["metrics"]
    assert free["pages"] == bound["pages"]
    moved = run_of(MEMORY, SwitchBudget(0.9, 1.0), steps=4)
    assert moved["metrics"] != free["metrics"]


def test_nearer_speaks_of_distances():
    def arm(rates):
        return {"pages": {"switch_rates": rates}}

    arms = {"constrained": arm([0.45, 0.5, 0.58]), "unconstrained": arm([0.9, 0.95, 0.1])}
    (line,) = nearer({"tasks": {"spiral": {"arms": arms}}}, "constrained", "unconstrained", SwitchBudget(0.5, 1.0))
    assert line["verdict"] == "better than unconstrained"
    assert line["mean"] == pytest.approx((0.35 + 0.45 + 0.32) / 3)
