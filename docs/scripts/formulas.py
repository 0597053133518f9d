"""Formulas as drawings in the page, made when the site is built. They need no math font, and nothing from elsewhere.

A hook of mkdocs: what arithmatex has marked (`$..$`, `$$..$$`) is drawn. A command that has no translation is an error,
and with it the build's. Sizes are in em, so that a formula grows with the text around it.
"""

import html
import re

import ziafont
import ziamath
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
GLYPH = re.compile(r'<symbol id="(\w+)".*?</symbol>', re.DOTALL)
HEAD = re.compile(r'<svg [^>]*?viewBox="(\S+) (\S+) (\S+) (\S+)"[^>]*>')
SIZE = 20  # units of a drawing to the em

ziafont.config.precision = 1  # of a twentieth of an em
ziamath.config.math.color = "currentColor"


def mathml(tex: str, display: str) -> str:
    """Return one formula as MathML, display "inline" or "block"."""
    try:
        out = convert(tex.strip(), display=display)
    except Exception as error:
        raise PluginError(f"formula {tex.strip()!r}: {type(error).__name__} {error}") from error
    if left := re.search(r"\\\w+", html.unescape(re.sub(r"<[^>]*>", " ", out))):
        raise PluginError(f"formula {tex.strip()!r}: {left[0]} is not known")
    return out


def drawing(tex: str, display: str) -> str:
    """Return the formula as SVG on the baseline of the text, with its TeX as label for screen readers."""
    svg = ziamath.Math(mathml(tex, display), size=SIZE).svg()
    left, top, width, height = (float(number) for number in HEAD.match(svg).groups())
    style = f"width: {width / SIZE:.3f}em"
    if display == "inline":
        style += f"; vertical-align: {-(top + height) / SIZE:.3f}em"
    label = html.escape(" ".join(tex.split()))
    box = f'viewBox="{left} {top} {width} {height}" role="img" aria-label="{label}"'
    return HEAD.sub(lambda _: f'<svg class="formula formula-{display}" style="{style}" {box}>', svg, count=1)


def each_once(content: str) -> str:
    """Return the page with every glyph defined where it is first used."""
    seen = set()

    def kept(match: re.Match) -> str:
        first = match[1] not in seen
        seen.add(match[1])
        return match[0] if first else ""

    return GLYPH.sub(kept, content)


def _formula(match: re.Match) -> str:
    return drawing(html.unescape(match[3]), "inline" if match[2] == "(" else "block")


def on_page_content(content: str, page, **_) -> str:
    try:
        return each_once(FORMULA.sub(_formula, content))
    except PluginError as error:
        raise PluginError(f"{page.file.src_path}: {error}") from error
