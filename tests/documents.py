"""Markdown: its Python blocks, its links and its headings."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"^```python[^\n]*\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def run_blocks(path: Path) -> int:
    """Runs them one after another in one scope, as a reader would; how many there were."""
    torch.manual_seed(0)
    scope: dict = {"__name__": path.stem}
    blocks = python_blocks(path)
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"{path.name}, block {number}", "exec"), scope)
    return len(blocks)


def links(path: Path) -> list[str]:
    """Where its links and pictures lead, code apart."""
    text = re.sub(r"`[^`\n]*`", "", FENCED.sub("", path.read_text()))
    return re.findall(r"\]\(([^)\s]+)[^)]*\)", text)


def anchors(path: Path) -> set[str]:
    """Of its headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings}
