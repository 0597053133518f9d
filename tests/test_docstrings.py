"""Every public name says what it is, names each of its parameters, and cites what it implements."""

import dataclasses
import inspect
import re
from importlib import import_module
from types import GenericAlias

import pytest

import titans_pytorch
from titans_pytorch import MemoryAsContextTransformer, NeuralMemory, SymplecticGating
from titans_pytorch.tasks.registry import TASKS

LISTED = (  # modules whose __all__ is public, beside the package's own
    "hf",
    "hf.convert",
    "tasks.task",
    "tasks.registry",
    "tasks.long_text",
    "analysis.trace",
    "tasks.benefit",
    "analysis.plot",
    "analysis.storing",
    "analysis.overshoot",
    "analysis.diagnosis",
    "training.checkpoint",
    "training.config",
    "training.evaluate",
    "training.loop",
    "training.mac",
    "training.rows",
    "training.run",
    "training.subjects",
    "cli.main",
)
FURTHER = {
    "layers.attention": ("SegmentedAttention",),
    "gates.observe": ("GateTrace", "calibrate_page_threshold", "gate_trace", "plot_gate_trace"),
    "mac_transformer": ("MacCache",),
    "memory_models": ("MemoryModel", "TapedWeights", "Weights"),
    "models.language_model": ("LanguageModel",),
    "models.state": ("ModelState",),
    "decoding.sampling": ("gumbel_sample", "min_p_filter", "sample", "top_k_filter", "top_p_filter"),
    "tasks.subject": ("subject_of", "task_of"),
    "training.text": ("text_of",),
}
TITANS, WHERE = "2501.00663", r"(eq\. \d+|section \d)"
SOURCES = {  # what implements a paper's equation, and the paper
    "NeuralMemory": TITANS,
    "paper_memory_kwargs": TITANS,
    "titans_memory": TITANS,
    "auxiliary_loss": TITANS,
    "MemoryMLP": TITANS,
    "MemoryAsContextTransformer": TITANS,
    "SegmentedAttention": TITANS,
    "MACLayer": TITANS,
    "MAGLayer": TITANS,
    "MALLayer": TITANS,
    "LMMLayer": TITANS,
    "TitansMAC": TITANS,
    "TitansMAG": TITANS,
    "TitansMAL": TITANS,
    "TitansLMM": TITANS,
    "TitansForCausalLM": TITANS,
    "MemorySwiGluMLP": "2002.05202",
    "TransformerBaseline": "2104.09864",
    "DynamicModeDecomposition": "10.1017/S0022112010001217",
    "min_p_filter": "2407.01082",
    "top_p_filter": "1904.09751",
}


def public() -> dict[str, object]:
    """name -> class or function, each once."""
    found = {name: getattr(titans_pytorch, name) for name in titans_pytorch.__all__}
    found = {name: value for name, value in found.items() if callable(value)}  # a dict has no docstring
    names = {module: import_module(f"titans_pytorch.{module}").__all__ for module in LISTED} | FURTHER
    for module, listed in names.items():
        for name in listed:
            value = getattr(import_module(f"titans_pytorch.{module}"), name)
            if isinstance(value, type) and not isinstance(value, GenericAlias) or inspect.isfunction(value):
                found.setdefault(name if found.get(name) is value else f"{module}.{name}", value)
    found |= {f"tasks.{kind.__name__}": kind for kind in TASKS.values()}
    return {name: value for i, (name, value) in enumerate(found.items()) if value not in list(found.values())[:i]}


PUBLIC = public()
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}


def parameters(callable_) -> list[str]:
    return [name for name in inspect.signature(callable_).parameters if name not in ("self", "cls")]


def unnamed(names, doc: str) -> list[str]:
    return [name for name in names if not re.search(rf"(?<!\w){name}(?!\w)", doc)]


def own_doc(cls: type) -> str:
    """Without the line that dataclasses and named tuples write themselves."""
    doc = cls.__doc__ or ""
    return "" if doc.startswith(f"{cls.__name__}(") else inspect.cleandoc(doc)


def built_from(cls: type) -> list[str]:
    """What a class is built from, as far as that is our doing."""
    if dataclasses.is_dataclass(cls) and cls.__module__.startswith("titans_pytorch.") and "__init__" not in _ours(cls):
        # a setting's line of help is its documentation
        return [f.name for f in dataclasses.fields(cls) if f.init and not f.metadata.get("help")]
    if issubclass(cls, tuple):
        return list(cls._fields)
    return parameters(cls.__init__) if "__init__" in _ours(cls) else []


def _ours(cls: type) -> set[str]:
    """The names that functions of this package define in a class."""
    found = set()
    for base in reversed(cls.__mro__):
        for name, value in vars(base).items():
            written = getattr(inspect.unwrap(value), "__code__", None) if callable(value) else None
            if inspect.isfunction(value) and written and "titans_pytorch" in written.co_filename:
                found.add(name)
            else:
                found.discard(name)
    return found


def members(cls: type) -> dict[str, object]:
    """The public methods and properties that our code defines."""
    found = {}
    for name in dir(cls):
        home = next((base for base in cls.__mro__ if name in vars(base)), None)
        if not name.startswith("_") and home is not None and home.__module__.startswith("titans_pytorch"):
            value = inspect.getattr_static(cls, name)
            if isinstance(value, (property, classmethod, staticmethod)) or inspect.isfunction(value):
                found[name] = value
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_what_it_is_and_every_parameter(name):
    value = PUBLIC[name]
    if inspect.isfunction(value):
        doc, names = inspect.getdoc(value) or "", parameters(value)
    else:
        doc, names = own_doc(value), built_from(value)
    assert len(doc) > 15, f"{name} has no docstring"
    assert not unnamed(names, doc), f"{name}: not in its docstring"


@pytest.mark.parametrize("name", CLASSES)
def test_methods_and_properties(name):
    missing = {}
    for member, value in members(CLASSES[name]).items():
        function = getattr(value, "__func__", value)
        doc = inspect.getdoc(value if isinstance(value, property) else getattr(CLASSES[name], member)) or ""
        if not doc:
            missing[member] = "no docstring"
        elif not isinstance(value, property) and (left := unnamed(parameters(function), doc)):
            missing[member] = left
    assert not missing


@pytest.mark.parametrize("name", SOURCES)
def test_the_source_is_cited(name):
    doc = inspect.getdoc(next(value for key, value in PUBLIC.items() if key.rpartition(".")[2] == name))
    assert SOURCES[name] in doc
    if SOURCES[name] == TITANS:
        assert re.search(WHERE, doc)


def groups(doc: str) -> dict[str, list[str]]:
    """title -> entries of each section "Args: title" of a docstring."""
    found: dict[str, list[str]] = {}
    title = None
    for line in doc.splitlines():
        if line and not line.startswith(" "):
            title = line.removeprefix("Args:").strip() if line.startswith("Args:") else None
        elif title is not None and (entry := re.match(r" {4}(\w+(?:, \w+)*): ", line)):
            found.setdefault(title, []).extend(entry[1].split(", "))
    return found


@pytest.mark.parametrize("cls", [NeuralMemory, MemoryAsContextTransformer, SymplecticGating])
def test_every_option_has_one_entry_in_a_group(cls):
    """In the class's docstring, which is what help() and the reference show."""
    found = groups(inspect.getdoc(cls))
    assert len(found) > 2
    assert all(found)
    entries = [entry for names in found.values() for entry in names]
    assert sorted(entries) == sorted(parameters(cls))


def test_the_reference_of_the_memory_begins_with_what_everyone_needs():
    doc = inspect.getdoc(NeuralMemory)
    assert list(groups(doc).values())[0] == ["dim", "chunk_size"]
    assert doc.index("NeuralMemory.paper") < doc.index("Args:")


@pytest.mark.parametrize("name", PUBLIC)
def test_sections_are_read_as_such(name):
    """Google style: "Args:", "Returns:" and "Raises:" behind a blank line, what is in them indented."""
    value = PUBLIC[name]
    documented = [value, *(members(value).values() if inspect.isclass(value) else ())]
    for doc in filter(None, map(inspect.getdoc, documented)):
        lines = ["", *doc.splitlines(), ""]
        for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
            assert not re.match(r"\s*(:param|Parameters\s*:|Arguments\s*:|Raises? \w+Error)", line), line
            if re.match(r"(Args:.*|Returns:|Raises:)$", line):
                assert before == ""
                assert after.startswith("    ")


def test_the_walk_finds_what_is_missing():
    assert len(PUBLIC) > 100
    assert unnamed(["x", "other"], "x [b n d] -> another") == ["other"]
    assert {"paper", "forward", "internal_heads", "init_weights"} <= members(NeuralMemory).keys()
