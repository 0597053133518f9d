"""What `import titans_pytorch` loads, where public names live, and that imports run one way."""

import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import titans_pytorch

PACKAGE = Path(titans_pytorch.__file__).parent

HEAVY = {
    "accelerated_scan",
    "axial_positional_embedding",
    "hyper_connections",
    "hypothesis",
    "matplotlib",
    "numpy",
    "pandas",
    "rotary_embedding_torch",
    "safetensors",
    "scipy",
    "sympy",
    "tensordict",
    "torchvision",
    "tqdm",
    "transformers",
    "triton",
    "x_transformers",
    "yaml",
}

PUBLIC = {
    "titans_pytorch": [
        "NeuralMemory",
        "NeuralMemState",
        "mem_state_detach",
        "auxiliary_loss",
        "MemoryDiverged",
        "paper_memory_kwargs",
        "load_peer_state_dict",
        "MemoryMLP",
        "MemoryAttention",
        "FactorizedMemoryMLP",
        "MemorySwiGluMLP",
        "GatedResidualMemoryMLP",
        "MemoryAsContextTransformer",
        "ModelConfig",
        "TitansConfig",
        "TitansLMM",
        "TitansMAC",
        "TitansMAG",
        "TitansMAL",
        "TransformerBaseline",
        "LMMLayer",
        "MACLayer",
        "MAGLayer",
        "MALLayer",
        "build_model",
        "titans_memory",
        "load_run",
        "SymplecticGating",
        "DynamicModeDecomposition",
        "Diagnosis",
        "diagnose",
        "GateTrace",
        "calibrate_page_threshold",
        "gate_trace",
        "plot_gate_trace",
    ],
    "titans_pytorch.neural_memory": ["NeuralMemory", "NeuralMemState", "mem_state_detach", "AssocScan"],
    "titans_pytorch.memory_models": [
        "MemoryMLP",
        "MemoryAttention",
        "FactorizedMemoryMLP",
        "MemorySwiGluMLP",
        "GatedResidualMemoryMLP",
        "ResidualNorm",
    ],
    "titans_pytorch.mac_transformer": ["MemoryAsContextTransformer", "SegmentedAttention", "flex_attention"],
    "titans_pytorch.symplectic_gate": ["SymplecticGating"],
    "titans_pytorch.dmd": ["DynamicModeDecomposition"],
    "titans_pytorch.storing": ["memories_of", "stop_storing", "storing_off"],
    "titans_pytorch.overshoot": ["overshoot_note", "watch_gains"],
    "titans_pytorch.sampling": ["min_p_filter", "sample"],
}


def loaded_by(statement: str) -> set[str]:
    """The modules that a fresh process has loaded after the statement."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_imports_stay_light():
    """The package loads nothing; the memory nothing heavy that torch has not loaded anyway."""
    package = loaded_by("import titans_pytorch")
    assert not {name.partition(".")[0] for name in package} & (HEAVY | {"torch", "einops"})
    assert {name for name in package if name.startswith("titans_pytorch")} == {"titans_pytorch"}
    torch_alone, memory = loaded_by("import torch"), loaded_by("from titans_pytorch import NeuralMemory, MemoryMLP")
    added = {name.partition(".")[0] for name in memory - torch_alone}
    assert not added & HEAVY
    assert "torch._dynamo" not in memory - torch_alone
    assert not {name for name in memory if name.startswith("titans_pytorch.mac_transformer")}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in PUBLIC.items() for name in names])
def test_public_names(module, name):
    value = getattr(import_module(module), name)
    assert callable(value) or (name == "flex_attention" and value is None)
    assert getattr(titans_pytorch, name, value) is value, "the same thing from every place"


def test_the_package_lists_its_names():
    assert set(PUBLIC["titans_pytorch"]) <= set(titans_pytorch.__all__)
    assert set(titans_pytorch.__all__) <= set(dir(titans_pytorch))
    for name in titans_pytorch.__all__:
        assert getattr(titans_pytorch, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'NeuralMemories'"):
        _ = titans_pytorch.NeuralMemories


# Packages, and modules at the top, lowest first: each imports only from those before it.
ORDER = [
    "common",
    "ops",
    "layers",
    "memory_models",
    "rules",
    "engines",
    "memory",
    "gates",
    "symplectic_gate",
    "dmd",
    "neural_memory",
    "analysis",
    "storing",
    "overshoot",
    "decoding",
    "sampling",
    "mac_transformer",
    "interop",
    "training",
    "tasks",
    "models",
    "cli",
    "hf",
]


def layer(module: str) -> int:
    """module: dotted, without the package's own name."""
    return ORDER.index(module.partition(".")[0])


def own_imports(path: Path):
    """(module, at the top level of the file) of each import of the package's own modules."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [a.name.removeprefix("titans_pytorch.") for a in node.names if a.name.startswith("titans_pytorch")]
        elif isinstance(node, ast.ImportFrom):
            base = list(parts[: len(parts) - node.level]) if node.level else []
            if not node.level and (node.module or "").partition(".")[0] != "titans_pytorch":
                continue
            base += (node.module or "").removeprefix("titans_pytorch").strip(".").split(".") if node.module else []
            base = [part for part in base if part]
            names = [".".join([*base, a.name]) for a in node.names]
            found = [name if is_module(name) else ".".join(base) for name in names]
        else:
            continue
        for module in filter(None, found):
            yield module, id(node) in top


def is_module(dotted: str) -> bool:
    path = PACKAGE / dotted.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}


def test_the_walk_sees_imports():
    assert ("engines.written", True) in set(own_imports(MODULES["memory.arguments"]))
    assert ("ops.vjp", True) in set(own_imports(MODULES["memory_models"]))
    assert ("interop.peer_mac", False) in set(own_imports(MODULES["interop.peer"]))


def test_layers_import_downwards():
    """In the order above, late imports included (NeuralMemory imports gates late)."""
    upwards = [
        f"{name} imports {module}"
        for name, path in MODULES.items()
        for module, _ in own_imports(path)
        if layer(module) > layer(name)
    ]
    assert not upwards, upwards


def test_no_module_imports_itself_in_a_circle():
    graph = {name: {module for module, top in own_imports(path) if top} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name, trail):
        assert name not in trail, f"circle: {' -> '.join([*trail, name])}"
        if name not in done:
            for module in graph.get(name, ()):
                visit(module, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])
