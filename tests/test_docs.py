"""The documentation: its code runs, its links lead somewhere, it names all that is public."""

import re
from pathlib import Path

import pytest

import titans_pytorch
from titans_pytorch.cli.main import COMMANDS

from .documents import ROOT, anchors, links, run_blocks

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
LINKING = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *PAGES]
LINKING += [path for name in ("CONTRIBUTING.md", "CHANGELOG.md") if (path := ROOT / name).exists()]


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_blocks_run(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # what a block writes is gone afterwards
    (tmp_path / "tests").symlink_to(ROOT / "tests")  # saved weights that blocks load
    run_blocks(page)


@pytest.mark.parametrize("page", LINKING, ids=short)
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"https?://|mailto:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{short(page)} links to {link}"
        if anchor and path.suffix == ".md" and not anchor.startswith("titans_pytorch."):  # those are mkdocstrings'
            assert anchor in anchors(path), f"{short(page)} links to {link}"


def test_every_public_name_is_in_the_reference():
    """By the path of its definition: `::: titans_pytorch.a.Name`, or among the members of `::: titans_pytorch.a`."""
    found = set()
    for page in (DOCS / "api").glob("*.md"):
        for path, options in re.findall(r"^::: (\S+)\n((?: +.*\n?)*)", page.read_text(), re.MULTILINE):
            members = re.search(r"(?<!_)members: \[(.*?)\]", options)
            found |= {f"{path}.{name.strip()}" for name in members[1].split(",")} if members else {path}
    for name in titans_pytorch.__all__:
        value = getattr(titans_pytorch, name)
        home = getattr(value, "__module__", f"titans_pytorch.{titans_pytorch._HOME_OF[name]}")  # a dict has none
        assert f"{home}.{getattr(value, '__qualname__', name)}" in found, f"{name} is not in docs/api"
        assert f"`{name}`" in (DOCS / "api" / "index.md").read_text(), f"{name} is not on the overview"


def test_every_method_of_the_memory_is_in_the_reference():
    """They are listed one by one, without the signature of the class."""
    path = f"{titans_pytorch.NeuralMemory.__module__}.NeuralMemory"
    listed = re.findall(rf"^::: {path}\.(\w+)$", (DOCS / "api" / "memory.md").read_text(), re.MULTILINE)
    own = [name for name in vars(titans_pytorch.NeuralMemory) if not name.startswith("_")]
    assert sorted(set(own) - {"label", "told_diverged", "stopped"}) == sorted(listed)


def test_every_command_is_in_the_reference():
    text = (DOCS / "api" / "cli.md").read_text()
    assert [name for name in COMMANDS if f"`titans {name}" not in text] == []


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    assert [page for page in PAGES if f": {page.relative_to(DOCS)}\n" not in text] == []
