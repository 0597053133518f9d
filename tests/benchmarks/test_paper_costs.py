"""The costs of the paper's memory: every arm runs, and is compared with the bare rule."""

import paper_costs


def test_every_arm_is_measured():
    found = {row["arm"]: row for row in paper_costs.measure(repeats=1, tokens=64)}
    assert set(found) == set(paper_costs.ARMS)
    assert found[paper_costs.RULE]["forward_to_rule"] == found[paper_costs.RULE]["train_to_rule"] == 1.0
    assert all(row["forward"] > 0 and row["train"] > 0 for row in found.values())
    assert {name for name, row in found.items() if row["written"] == 1.0} >= {paper_costs.RULE, "paper"}
    assert all(0 < found[name]["written"] < 1 for name in paper_costs.ARMS if "threshold" in name)
