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
    "surprise": ("auxiliary_loss",),
    "diverged": ("MemoryDiverged",),
    "presets": ("paper_memory_kwargs",),
    "peer_checkpoint": ("load_peer_state_dict",),
    "mac_transformer": ("MemoryAsContextTransformer", "SegmentedAttention"),
    "symplectic_gate": ("SymplecticGating",),
    "dmd": ("DynamicModeDecomposition",),
    "models.config": ("ModelConfig", "TitansConfig"),
    "models.family": ("TitansLMM", "TitansMAC", "TitansMAG", "TitansMAL", "TransformerBaseline", "build_model"),
    "models.lmm": ("LMMLayer",),
    "models.mac": ("MACLayer",),
    "models.mag": ("MAGLayer",),
    "models.mal": ("MALLayer",),
    "models.memory": ("titans_memory",),
    "gating.observe": ("GateTrace", "calibrate_page_threshold", "gate_trace", "plot_gate_trace"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


class _AfterTorch:
    """Registers the package's states with torch.load as soon as torch is imported: this package does not import it."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module):
                load(module)
                sys.meta_path.remove(self)
                _register_states()

            spec.loader.exec_module = load_and_register
        return spec


def _register_states():
    import_module(".saved_states", __name__).register()


if "torch" in sys.modules:
    _register_states()
else:
    sys.meta_path.insert(0, _AfterTorch())


def __getattr__(name):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
