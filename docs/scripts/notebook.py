"""Runs the notebook's cells and stores what they print and draw (`make notebook`; about 15 seconds of one core).

The notebook remembers which cells gave its outputs: a test compares.
"""

import base64
import contextlib
import hashlib
import io
import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from titans_pytorch.training.options import OneLineParser

NOTEBOOK = Path(__file__).parents[2] / "examples" / "titans.ipynb"
DPI = 72  # small pictures: about 10 kB each


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def sources_hash(notebook: dict) -> str:
    """Return the SHA-256 of the code cells."""
    return hashlib.sha256(json.dumps([cell["source"] for cell in code_cells(notebook)]).encode()).hexdigest()


def run(notebook: dict) -> dict:
    """Run the cells in order and store their outputs in the notebook. Returns the names that they defined."""
    scope: dict = {"__name__": "titans"}
    plt.close("all")
    for number, cell in enumerate(code_cells(notebook), start=1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, code cell {number}", "exec"), scope)
        cell["execution_count"] = number
        cell["outputs"] = [*text(printed.getvalue()), *map(picture, plt.get_fignums())]
        plt.close("all")
    notebook["metadata"]["sources"] = sources_hash(notebook)
    return scope


def text(printed: str) -> list[dict]:
    lines = printed.splitlines(keepends=True)
    return [{"output_type": "stream", "name": "stdout", "text": lines}] if lines else []


def picture(number: int) -> dict:
    png = io.BytesIO()
    plt.figure(number).savefig(png, format="png", dpi=DPI, metadata={"Software": None})
    data = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": ["<Figure>"]}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=NOTEBOOK)
    args = parser.parse_args(argv)
    notebook = json.loads(NOTEBOOK.read_text())
    run(notebook)
    args.out.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    print(f"{args.out}: {args.out.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
