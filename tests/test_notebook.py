"""The notebook runs from its first cell to its last, and shows what it says. (About 15 seconds of one core.)"""

import json

import pytest
import torch

from .documents import ROOT

NOTEBOOK = ROOT / "examples" / "titans.ipynb"


def cells(kind: str) -> list[dict]:
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_it_is_stored_without_outputs():
    for cell in cells("code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.slow
def test_it_runs():
    pytest.importorskip("matplotlib").use("agg")
    import matplotlib.pyplot as plt

    threads, scope = torch.get_num_threads(), {"__name__": "titans"}
    try:
        for number, cell in enumerate(cells("code")):
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, code cell {number}", "exec"), scope)
    finally:
        torch.set_num_threads(threads)
    assert len(plt.get_fignums()) == 3
    plt.close("all")
    assert scope["errors"][0] > 0.1
    assert scope["errors"][-1] < 0.01
    assert scope["surprised"][3] > 10 * scope["surprised"][:3].max()
    assert scope["difference"] < 1e-5
    assert scope["with_memory"] > 0.9
    assert scope["longer"] > 0.9
    assert scope["without"] < 0.3
    assert 0.1 < scope["trace"].switch_rate < 0.5
