"""Formulas as MathML, made when the site is built: browsers draw it themselves, nothing is loaded from elsewhere.

A hook of mkdocs: what arithmatex has marked (`$..$`, `$$..$$`) is translated. A command that has no translation is an
error, and with it the build's.
"""

import html
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def mathml(tex: str, display: str) -> str:
    """One formula, display "inline" or "block"."""
    try:
        out = convert(tex.strip(), display=display)
    except Exception as error:
        raise PluginError(f"formula {tex.strip()!r}: {type(error).__name__} {error}") from error
    if left := re.search(r"\\\w+", html.unescape(re.sub(r"<[^>]*>", " ", out))):
        raise PluginError(f"formula {tex.strip()!r}: {left[0]} is not known")
    return out


def _formula(match: re.Match) -> str:
    return mathml(html.unescape(match[3]), "inline" if match[2] == "(" else "block")


def on_page_content(content: str, page, **_) -> str:
    try:
        return FORMULA.sub(_formula, content)
    except PluginError as error:
        raise PluginError(f"{page.file.src_path}: {error}") from error
