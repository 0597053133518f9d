"""Law 8 of everything public that is constructed: a value that an argument does not take raises a ValueError of one
line that begins with the argument's name, says what it got and what it takes. No other error comes of it."""

import dataclasses
import inspect
import re

import pytest

import titans_pytorch as t
from titans_pytorch.layers.norms import MultiheadRMSNorm
from titans_pytorch.models.attention import SegmentAttention, WindowAttention
from titans_pytorch.models.config import ModelConfig
from titans_pytorch.models.gates import Gate
from titans_pytorch.models.memory import PersistentTokens
from titans_pytorch.training.config import DataConfig, ReportConfig, TaskConfig, TrainConfig
from titans_pytorch.training.mac import MacConfig

from ..helpers import refusal

INF = float("inf")
WRONG = (None, "x", "false", -1, 0, 1.5, float("nan"), INF, -INF, [], {}, True, object(), (1, 2, 3), int)
TINY = ModelConfig(vocab_size=8, d_model=16, n_layers=1, n_heads=2, mem_heads=2)
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
    t.paper_memory_kwargs: {"dim_head": 8},
    t.AssocScan: {},
    t.ResidualNorm: {"dim": 8, "model": t.MemoryMLP(8, 1)},
    t.TitansMAC: {"config": TINY},
    t.TitansMAG: {"config": TINY},
    t.TitansMAL: {"config": TINY},
    t.TitansLMM: {"config": TINY},
    t.TransformerBaseline: {"config": TINY},
    t.build_model: {"config": TINY},
    WindowAttention: {"dim": 16, "heads": 2, "window": 4},
    SegmentAttention: {"dim": 16, "heads": 2, "segment": 4},
    Gate: {"dim": 8},
    PersistentTokens: {"n_persistent": 2, "dim": 8},
    MultiheadRMSNorm: {"dim": 8, "heads": 2},
    t.ModelConfig: {},
    t.TitansConfig: {},
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


# what is called, not constructed: test_public_calls.py; or results, which nobody constructs
OTHERS = {"NeuralMemState", "GateTrace", "mem_state_detach", "auxiliary_loss", "load_peer_state_dict", "gate_trace"}
OTHERS |= {"calibrate_page_threshold", "plot_gate_trace", "MemoryDiverged", "diagnose", "Diagnosis", "load_run"}
OTHERS |= {"DEFAULT_CONFIG", "VARIANT_CONFIGS"}  # values
THRESHOLDS = {"surprise_threshold", "symplectic_page_threshold", "gate_threshold"}  # infinite: never, or always


def test_every_public_name_is_listed():
    listed = {made.__name__ for made in NEEDED} | OTHERS
    assert set(t.__all__) <= listed, "a new public name joins NEEDED, or test_public_calls.py and OTHERS"


@pytest.mark.parametrize(("made", "name"), ARGUMENTS, ids=IDS)
def test_numbers_are_finite_and_sizes_are_not_negative(made, name):
    """By the argument's annotation; thresholds alone may be infinite."""
    takes = str(inspect.signature(made).parameters[name].annotation)
    if not re.search(r"\b(int|float)\b", takes):
        return
    values = [float("nan"), "1", "false", [1.0], object()]
    values += [] if name in THRESHOLDS else [INF, -INF]
    values += [True, -1, 1.5] if "float" not in takes else []
    for value in values:
        with pytest.raises(ValueError, match=refusal(name)):
            made(**NEEDED[made] | {name: value})


@pytest.mark.parametrize("made", NEEDED, ids=lambda made: made.__name__)
def test_unknown_keywords(made):
    def call():
        result = made(**NEEDED[made], unknown_keyword=1)
        return t.NeuralMemory(8, **result)  # keywords on their way to a memory

    with pytest.raises((TypeError, ValueError), match="unknown_keyword"):
        call()


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
