"""configs/constraints.txt: versions that lie in the ranges of pyproject.toml, for everything that the tests use."""

import re
from importlib.metadata import distribution

import pytest

from .documents import ROOT
from .test_docs_scripts import script

pytest.importorskip("packaging")
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FILE = ROOT / "configs" / "constraints.txt"
NOT_IMPORTED = {"mypy"}  # a tool beside the tests


def requirements(extras: tuple[str, ...]) -> list[Requirement]:
    text = (ROOT / "pyproject.toml").read_text()
    found = []
    for key in ("dependencies", *extras):
        block = re.search(rf"^{key} = \[(.*?)\]$", text, re.DOTALL | re.MULTILINE)[1]
        found += [Requirement(written) for written in re.findall(r'"(.*?)"', block)]
    assert len(found) > 10
    return found


def pins() -> dict[str, Requirement]:
    lines = [line for line in FILE.read_text().splitlines() if not line.startswith("#")]
    found = [Requirement(line) for line in lines]
    assert [pin for pin in found if [each.operator for each in pin.specifier] != ["=="]] == []
    return {canonicalize_name(pin.name): pin for pin in found}


def version(pin: Requirement) -> str:
    (only,) = pin.specifier
    return only.version


@pytest.mark.parametrize("wanted", requirements(("bench", "examples", "hf", "train", "test")), ids=str)
def test_every_version_lies_in_its_range(wanted):
    pin = pins().get(canonicalize_name(wanted.name))
    if pin is None:
        assert wanted.name in NOT_IMPORTED, f"{wanted.name} is missing: make constraints"
    else:
        assert wanted.specifier.contains(version(pin)), f"{pin} is not in {wanted}: make constraints"


def test_it_names_no_build_and_no_place():
    """Local versions (+cpu) and paths hold on one machine."""
    assert re.findall(r"\+|file:|https?:|@", FILE.read_text()) == []


@pytest.mark.parametrize(
    ("requires", "first"), [(None, 0), (">=3.8", 8), (">=3.11", 11), (">=3.11.0", 11), ("!=3.14.1,>=3.12", 12)]
)
def test_the_first_python_of_a_release(requires, first):
    assert script("constraints").first_python(requires) == first


def test_a_release_of_newer_pythons_alone_says_so():
    constraints = script("constraints")
    pytest_here = distribution("pytest")
    assert constraints.line(pytest_here, 99) == f"pytest=={pytest_here.version}"
    assert constraints.line(pytest_here, 0).startswith(f'pytest=={pytest_here.version} ; python_version >= "3.')
