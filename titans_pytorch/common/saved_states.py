"""Let torch.load with weights_only = True read every state and cache of the package, even before its modules are
imported: a stand-in is registered under each class's name, and imports the class when a file needs it.

Imports nothing but torch.
"""

from importlib import import_module

from torch.serialization import add_safe_globals

STATES = {  # modules of each class, the present one first
    "NeuralMemState": ("memory.state", "memory_state"),
    "_rebuild": ("engines.lazy", "memory_state"),
    "KeyValueCache": ("layers.attention", "attention"),
    "LayerCache": ("layers.memory_as_context", "blocks"),
    "MacCache": ("mac_transformer",),
    "SegmentCache": ("models.attention",),
    "PlainState": ("models.baseline",),
    "LMMState": ("models.lmm",),
    "MACState": ("models.mac",),
    "MAGState": ("models.mag",),
    "MALState": ("models.mal",),
    "ModelState": ("models.state",),
    "TitansCache": ("hf.cache",),
}


def stand_in(home: str, module: str, name: str) -> type:
    """Return a class named `module.name` whose instances are made by `home.name`."""

    def new(cls, *args):
        return getattr(import_module(home), name)(*args)

    return type(name, (), {"__module__": module, "__new__": new})


def register() -> None:
    """Allow torch.load to make states."""
    root = __name__.partition(".")[0]
    add_safe_globals(
        [
            stand_in(f"{root}.{modules[0]}", f"{root}.{module}", name)
            for name, modules in STATES.items()
            for module in modules
        ]
    )
