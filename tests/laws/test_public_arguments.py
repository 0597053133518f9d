"""Law 8 of everything public that is constructed: a value that an argument does not take raises a ValueError of one
line that begins with the argument's name, says what it got and what it takes. No other error comes of it."""

import dataclasses
import inspect
import re

import pytest

import titans_pytorch as t
from titans_pytorch.training.config import DataConfig, ReportConfig, TaskConfig, TrainConfig
from titans_pytorch.training.mac import MacConfig

from ..helpers import refusal

WRONG = (None, "x", -1, 0, 1.5, float("nan"), [], {}, True, object(), (1, 2, 3))
NEEDED = {
    t.NeuralMemory: {"dim": 8},
    t.MemoryAsContextTransformer: {
        "num_tokens": 8,
        "dim": 8,
        "depth": 2,
        "segment_len": 4,
        "heads": 2,
        "dim_head": 4,
    },
    t.SegmentedAttention: {"dim": 8, "segment_len": 4, "heads": 2, "dim_head": 4},
    t.SymplecticGating: {"dim": 8},
    t.DynamicModeDecomposition: {},
    t.MemoryMLP: {"dim": 8, "depth": 2},
    t.FactorizedMemoryMLP: {"dim": 8, "depth": 2},
    t.MemorySwiGluMLP: {"dim": 8},
    t.GatedResidualMemoryMLP: {"dim": 8, "depth": 1},
    t.MemoryAttention: {"dim": 8},
    t.MACLayer: {"dim": 16},
    t.MAGLayer: {"dim": 16},
    t.MALLayer: {"dim": 16},
    t.LMMLayer: {"dim": 16},
    t.titans_memory: {"dim": 8},
    t.ModelConfig: {},
    DataConfig: {},
    TaskConfig: {},
    TrainConfig: {},
    ReportConfig: {},
    MacConfig: {},
}
ARGUMENTS = [
    (made, name)
    for made in NEEDED
    for name, parameter in inspect.signature(made).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD
]
IDS = [f"{made.__name__}-{name}" for made, name in ARGUMENTS]


@pytest.mark.parametrize(("made", "name"), ARGUMENTS, ids=IDS)
def test_what_an_argument_does_not_take(made, name):
    for value in WRONG:
        try:
            made(**NEEDED[made] | {name: value})
        except ValueError as error:
            message = str(error)
            assert re.match(refusal(name), message), message
            assert "\n" not in message


@pytest.mark.parametrize(("made", "name"), ARGUMENTS, ids=IDS)
def test_flags_take_truth_values_alone(made, name):
    """The word "false" would be true."""
    if not isinstance(inspect.signature(made).parameters[name].default, bool):
        return
    for value in ("false", None, 2):
        with pytest.raises(ValueError, match=f"^{name} must be [Tt]rue or [Ff]alse, got {value!r}$"):
            made(**NEEDED[made] | {name: value})


@pytest.mark.parametrize("kind", [k for k in NEEDED if dataclasses.is_dataclass(k)])
def test_settings_keep_their_types(kind):
    for field in dataclasses.fields(kind):
        if isinstance(field.default, float):
            assert type(getattr(kind(**{field.name: field.default}), field.name)) is float
            with pytest.raises(ValueError, match=f"^{field.name} must be .*number.*, got nan"):
                kind(**{field.name: float("nan")})
