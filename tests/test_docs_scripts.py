"""What draws, measures and builds the documentation. (What builds it needs the extra `docs`, and runs in make docs.)"""

import importlib.util
import os
import re
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from .documents import ROOT


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PROGRAMS = sorted(path.stem for path in (ROOT / "docs" / "scripts").glob("*.py") if "def main(" in path.read_text())


@pytest.mark.parametrize("name", PROGRAMS)
def test_command_lines(name, capsys):
    program = script(name)
    with pytest.raises(SystemExit) as stopped:
        program.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("titans_pytorch ")
    if name != "sizes":  # other options are pip's
        with pytest.raises(SystemExit) as stopped:
            program.main(["--versoin"])
        assert stopped.value.code == 2
        assert "the nearest is --version" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "start"), [("timeline", b"<?xml"), ("paged", b"\x89PNG")])
def test_pictures_are_drawn(name, start, tmp_path):
    assert script(name).main(["--out", str(tmp_path / "picture")]) == 0
    assert (tmp_path / "picture").read_bytes().startswith(start)
    assert [path.name for path in tmp_path.iterdir()] == ["picture"]


@pytest.mark.parametrize(("eta", "wanted"), [(0.0, 2.0), (0.5, 3.0)])
def test_the_edge_of_a_quadratic(eta, wanted):
    """Gradient descent with heavy-ball momentum settles below 2 (1 + eta)."""
    setting = {"depth": 1, "wrapped": False, "alpha": 0.0, "eta": eta, "per_token": False}
    assert script("stability").edge(4, 4 * 60, **setting) == pytest.approx(wanted, rel=0.05)


def test_what_diverges_is_named():
    stability = script("stability")
    assert float(stability.cell(lambda: stability.NeuralMemory(64, 16), 64, 1)) < 10
    bare = {"init_decay_bias": -6.0, "mem_model_norm_add_residual": False}
    found = stability.cell(lambda: stability.NeuralMemory(64, 16, batch_size=16, **bare), 512, 1)
    assert found == "lost by 512 (one token)"


def test_a_window_of_attention():
    """It sees the last tokens, and none that are later or farther back."""
    attention = script("own_model").WindowAttention(8, window=3).double()
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    for changed in range(9):
        other = x.clone()
        other[:, changed] += 1
        seen = (attention(other) != attention(x)).any(dim=-1)[0].nonzero().flatten().tolist()
        assert seen == [at for at in range(changed, changed + 3) if at < 9]


def test_accuracies_of_own_models(capsys):
    assert script("own_model").main(["--table", "rates", "--seeds", "1", "--steps", "1"]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("rates: accuracy")
    assert [line.split("|")[1].strip() for line in lines] == ["lr=0.001", "lr=0.003", "lr=0.01", "lr=0.03"]
    assert all(float(line.split("|")[2].split()[0]) < 0.15 for line in lines)


def test_formulas():
    pytest.importorskip("ziamath")
    from mkdocs.exceptions import PluginError

    formulas = script("formulas")
    inline = r'a <span class="arithmatex">\(x &lt; y\)</span> b'
    page = formulas.on_page_content(inline + r'<div class="arithmatex">\[x_0\]</div>' + inline, None)
    assert re.findall('<svg class="formula formula-(inline|block)"', page) == ["inline", "block", "inline"]
    assert page.count('aria-label="x &lt; y"') == 2
    drawn = re.findall('<symbol id="(.*?)"', page)
    assert sorted(set(drawn)) == sorted(drawn) != []  # one of each
    assert set(re.findall('href="#(.*?)"', page)) == set(drawn)
    assert "black" not in page  # the colour of the text, in both themes
    with pytest.raises(PluginError, match="nosuch"):
        formulas.drawing(r"\nosuch x", "inline")


def test_a_subscript_lies_below_the_line():
    pytest.importorskip("ziamath")
    formulas = script("formulas")

    def depth(tex):
        return -float(re.search(r"vertical-align: (-?[\d.]+)em", formulas.drawing(tex, "inline"))[1])

    assert depth("M_0") > depth("M") + 0.1


@pytest.mark.parametrize(
    ("page", "link", "wanted"),
    [
        ("gates.md", "../benchmarks/README.md#b", "benchmarks/README.md#b"),
        ("api/gates.md", "../../benchmarks/x.png", "../benchmarks/x.png"),
        ("index.md", "../examples/x.py", "examples/x.py"),
        ("gates.md", "paper.md", "paper.md"),
        ("benchmarks/README.md", "../docs/paper.md", "../paper.md"),
        ("benchmarks/README.md", "results/x.png", "results/x.png"),
    ],
)
def test_links_between_docs_and_benchmarks(page, link, wanted):
    pytest.importorskip("mkdocs")
    file = SimpleNamespace(src_uri=page)
    found = script("pages").on_page_markdown(f"[a]({link})", SimpleNamespace(file=file))
    assert found == f"[a]({wanted})"


def test_docstrings():
    pytest.importorskip("griffe")
    docstrings = script("docstrings")
    text = "What.\n\na: first\n   more\nb, c [n]: others\n\nNote: no name"
    wanted = "What.\n\n- `a`: first\n     more\n- `b, c` [n]: others\n\nNote: no name"
    assert docstrings.listed(text, {"a", "b", "c"}) == wanted
    shared = "Args:\n    a, b: both\n        more\n    c: one"
    assert docstrings.apart(shared) == "Args:\n    a: both\n        more\n    b: see `a`.\n    c: one"
    assert docstrings.explained('setting(3, "tokens " "read")') == ("3", "tokens read")
    assert docstrings.explained('field(default=0.5, metadata={"help": "x"})') == ("0.5", "x")
    assert docstrings.explained("field(default_factory=list)") is None


@pytest.mark.slow
def test_the_site(tmp_path):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    pages = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "install.html", "concepts.html", "api/memory.html"} <= pages.keys()
    for name, page in pages.items():
        assert re.findall(r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//[^"]*"', page) == [], name
        assert re.findall(r'<link rel="stylesheet"[^>]* href="(?:https?:)?//[^"]*"', page) == [], name
        assert "arithmatex" not in page, name
    assert pages["concepts.html"].count('<svg class="formula') > 10
    theme = "".join(path.read_text() for path in (tmp_path / "assets" / "stylesheets").glob("*.css"))
    classes = set(" ".join(re.findall(r'<svg class="(formula .*?)"', "".join(pages.values()))).split())
    assert classes == {"formula", "formula-inline", "formula-block"}
    assert [name for name in classes if f".{name}" in theme] == []  # the theme gives others a meaning of its own
    # from disk a page can read a script, and neither JSON nor a Worker
    assert (tmp_path / "search" / "search_index.js").read_text().startswith("var __index = {")
    assert 'src="../iframe-worker.js"' in pages["api/memory.html"]
    for layer in ("mac.MACLayer", "mag.MAGLayer", "mal.MALLayer", "lmm.LMMLayer"):
        assert f'id="titans_pytorch.models.{layer}.forward"' in pages["api/models.html"]
    reference = pages["api/memory.html"]
    where = [reference.index(text) for text in ("NeuralMemory.paper(dim, segment)", "What everyone needs", "Rates")]
    assert where == sorted(where)
