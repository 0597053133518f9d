"""Neural memory that learns at test time (Titans, arXiv 2501.00663).

Names are imported from their modules on first use, so that `import titans_pytorch` stays light.
"""

import sys
from importlib import import_module

_HOMES = {
    "neural_memory": ("NeuralMemory", "NeuralMemState", "mem_state_detach", "AssocScan"),
    "memory_models": (
        "FactorizedMemoryMLP",
        "GatedResidualMemoryMLP",
        "MemoryAttention",
        "MemoryMLP",
        "MemorySwiGluMLP",
        "ResidualNorm",
    ),
    "memory.surprise": ("auxiliary_loss",),
    "memory.diverged": ("MemoryDiverged",),
    "memory.presets": ("paper_memory_kwargs",),
    "interop.peer": ("load_peer_state_dict",),
    "mac_transformer": ("MemoryAsContextTransformer", "SegmentedAttention"),
    "gates.symplectic": ("SymplecticGating",),
    "gates.dmd": ("DynamicModeDecomposition",),
    "models.config": ("ModelConfig", "TitansConfig"),
    "models.other_settings": ("DEFAULT_CONFIG", "VARIANT_CONFIGS"),
    "models.family": ("TitansLMM", "TitansMAC", "TitansMAG", "TitansMAL", "TransformerBaseline", "build_model"),
    "models.lmm": ("LMMLayer",),
    "models.mac": ("MACLayer",),
    "models.mag": ("MAGLayer",),
    "models.mal": ("MALLayer",),
    "models.memory": ("titans_memory",),
    "models.runs": ("load_run",),
    "analysis.diagnosis": ("Diagnosis", "diagnose"),
    "gates.observe": ("GateTrace", "calibrate_page_threshold", "gate_trace", "plot_gate_trace"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def _register_states():
    """torch.load then reads saved states and caches with weights_only = True."""
    import_module(".common.saved_states", __name__).register()


if "torch" in sys.modules:
    _register_states()


def __getattr__(name):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    _register_states()
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
