"""Every Python block of the README runs, one after another, as a reader would run them."""

import re

import pytest

from .documents import ROOT, run_blocks


def test_blocks_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert run_blocks(ROOT / "README.md") >= 4


@pytest.mark.parametrize("name", ["titans_pytorch", "tests", "train_mac.py"])
def test_the_tree_names_what_is_there(name):
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("## What lies where") :]
    assert name in tree
    named = set(re.findall(r"[\w/]+\.py", tree))
    for path in named:
        assert list(ROOT.glob(f"**/{path}")), f"{path} is named but not there"
    modules = {p.name for p in (ROOT / "titans_pytorch").glob("*.py")} - {"__init__.py"}
    internal = {"checks.py", "norms.py", "axial_positions.py", "longterm_tokens.py", "peer_checkpoint_mac.py"}
    missing = modules - named - internal
    assert not missing, f"not in the README's tree: {sorted(missing)}"
