"""Plain text: tables and formatted numbers."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Format a table: columns as wide as their contents, the first `left` of them flush left, the others flush
    right.
    """
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def text(line):
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([text(lines[0]), "  ".join("-" * w for w in widths), *(text(line) for line in lines[1:])])


def seconds(value: float) -> str:
    if value >= 100:
        return f"{value:.0f} s"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def size(value: float) -> str:
    return f"{value / 1e9:.3g} GB" if abs(value) >= 1e9 else f"{value / 1e6:.3g} MB"


def percent(value: float) -> str:
    return f"{value:.1%}"


def times(ratio: float) -> str:
    """Format a ratio: 12.3x, or 1/12.3 below one."""
    if ratio <= 0:
        return "0"
    return f"{ratio:.3g}x" if ratio >= 1 else f"1/{1 / ratio:.3g}"
