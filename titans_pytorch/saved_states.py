"""torch.load with weights_only = True reads every state and cache of the package, also where none of its modules was
imported: a stand-in for each class is registered under the class's name and imports it when a file asks for it.

Loads nothing but torch.
"""

from importlib import import_module

from torch.serialization import add_safe_globals

STATES = {
    "memory_state": ("NeuralMemState", "_rebuild"),
    "attention": ("KeyValueCache",),
    "blocks": ("LayerCache",),
    "mac_transformer": ("MacCache",),
    "models.attention": ("SegmentCache",),
    "models.baseline": ("PlainState",),
    "models.lmm": ("LMMState",),
    "models.mac": ("MACState",),
    "models.mag": ("MAGState",),
    "models.mal": ("MALState",),
    "models.state": ("ModelState",),
    "hf.cache": ("TitansCache",),
}


def stand_in(module: str, name: str) -> type:
    """A class of that name whose instances are made by the real one."""

    def new(cls, *args):
        return getattr(import_module(module), name)(*args)

    return type(name, (), {"__module__": module, "__new__": new})


def register() -> None:
    """Allows torch.load to make the states."""
    classes = [stand_in(f"{__package__}.{module}", name) for module, names in STATES.items() for name in names]
    add_safe_globals(classes)
