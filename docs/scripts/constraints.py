"""Prints the versions in this environment, as constraints for pip. `make constraints` runs it after the tests.

A release that does not exist for the oldest Python of this package holds from its own oldest Python on.
"""

import platform
import sys
from importlib.metadata import Distribution, distributions, metadata

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from titans_pytorch.training.options import OneLineParser

HEAD = """\
# Versions with which all tests passed (make constraints), on Python {python}.
# pip install -c configs/constraints.txt -e .
"""
APART = {"pip", "titans-pytorch"}


def line(package: Distribution, oldest: int) -> str:
    """Return NAME==VERSION, with a marker if the release needs a newer Python than 3.`oldest`."""
    pin = f"{canonicalize_name(package.name)}=={Version(package.version).public}"  # torch's 2.13.0+cpu is its 2.13.0
    first = first_python(package.metadata.get("Requires-Python"))
    return pin if first <= oldest else f'{pin} ; python_version >= "3.{first}"'


def first_python(requires: str | None) -> int:
    """Return the first n for which "Requires-Python" allows Python 3.n."""
    pythons = SpecifierSet(requires or "")
    return next(minor for minor in range(100) if pythons.contains(f"3.{minor}.99"))


def main(argv: list[str] | None = None) -> int:
    OneLineParser(description=__doc__).parse_args(argv)
    oldest = first_python(metadata("titans-pytorch")["Requires-Python"])
    found = {canonicalize_name(package.name): package for package in distributions()}
    sys.stdout.write(HEAD.format(python=platform.python_version()))
    for name in sorted(set(found) - APART):
        print(line(found[name], oldest))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
