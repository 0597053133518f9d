"""The notebook runs from its first cell to its last, shows what it says, and holds the outputs of the cells it has.

(The run takes about 15 seconds of one core.)
"""

import base64
import json
import re

import pytest
import torch

from .documents import ROOT
from .test_docs_scripts import script

pytest.importorskip("matplotlib")
NOTEBOOK = ROOT / "examples" / "titans.ipynb"
AGAIN = "its cells have changed since its outputs were stored: make notebook"


def stored() -> dict:
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    return notebook


def outputs(notebook: dict, kind: str) -> list[dict]:
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [output for cell in cells for output in cell["outputs"] if output["output_type"] == kind]


def test_its_outputs_are_those_of_its_cells():
    notebook = stored()
    runner = script("notebook")
    assert notebook["metadata"]["sources"] == runner.sources_hash(notebook), AGAIN
    counts = [cell["execution_count"] for cell in runner.code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), AGAIN


def test_a_changed_cell_is_noticed():
    notebook = stored()
    before = script("notebook").sources_hash(notebook)
    cell = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    cell["source"][-1] += " "
    assert script("notebook").sources_hash(notebook) != before


def test_what_is_stored_is_small_and_of_no_machine():
    assert NOTEBOOK.stat().st_size < 200_000
    notebook = stored()
    pictures = [output["data"]["image/png"] for output in outputs(notebook, "display_data")]
    assert len(pictures) == 3
    for picture in pictures:
        assert base64.b64decode(picture).startswith(b"\x89PNG")
    printed = "".join("".join(output["text"]) for output in outputs(notebook, "stream"))
    assert "accuracy" in printed
    assert re.findall(r"(?:^|\s)(?:/\w+/\S*|[A-Z]:\\\S*)|Traceback|Warning", printed) == []


def test_outputs_are_stored():
    source = ["print('a')\n", "import matplotlib.pyplot as plt\n", "plt.plot([1, 2])\n", "print('b')"]
    cells = [{"cell_type": "markdown", "source": []}]
    cells += [{"cell_type": "code", "source": source}, {"cell_type": "code", "source": ["c = 3"], "outputs": [1]}]
    notebook = {"cells": cells, "metadata": {}}
    runner = script("notebook")
    assert runner.run(notebook)["c"] == 3
    first, second = runner.code_cells(notebook)
    assert first["outputs"][0] == {"output_type": "stream", "name": "stdout", "text": ["a\n", "b\n"]}
    assert [output["output_type"] for output in first["outputs"]] == ["stream", "display_data"]
    assert (second["outputs"], second["execution_count"]) == ([], 2)
    assert notebook["metadata"]["sources"] == runner.sources_hash(notebook)


@pytest.mark.slow
def test_it_runs():
    threads, notebook = torch.get_num_threads(), stored()
    shapes = [(cell["execution_count"], len(cell["outputs"])) for cell in script("notebook").code_cells(notebook)]
    try:
        scope = script("notebook").run(notebook)
    finally:
        torch.set_num_threads(threads)
    cells = script("notebook").code_cells(notebook)
    assert [(cell["execution_count"], len(cell["outputs"])) for cell in cells] == shapes
    assert scope["errors"][0] > 0.1
    assert scope["errors"][-1] < 0.01
    assert scope["surprised"][3] > 10 * scope["surprised"][:3].max()
    assert scope["difference"] < 1e-5
    assert scope["with_memory"] > 0.9
    assert scope["longer"] > 0.9
    assert scope["without"] < 0.3
    assert 0.1 < scope["trace"].switch_rate < 0.5
