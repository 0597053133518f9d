"""Law 8 of everything public that is called: None, no rows, another rank, width or dtype, ids out of range and words in
place of flags raise a ValueError that names the argument."""

import pytest
import torch
from torch import nn

import titans_pytorch as t
from titans_pytorch.analysis.storing import memories_of, page_switches, stop_storing
from titans_pytorch.decoding.sampling import gumbel_sample, min_p_filter, top_k_filter, top_p_filter
from titans_pytorch.layers.norms import RMSNorm
from titans_pytorch.models.attention import SegmentAttention, WindowAttention
from titans_pytorch.models.gates import Gate
from titans_pytorch.models.memory import titans_memory

from ..helpers import refusal

DIM = 8
SMALL = {"vocab_size": 16, "d_model": 16, "n_layers": 1, "n_heads": 2, "mem_heads": 2, "window": 4, "chunk_size": 4}


def x(*shape, dtype=torch.float32):
    return torch.zeros(shape or (2, 5, DIM), dtype=dtype)


# what is no [b n 8] of float32
TOKENS = {
    "None": lambda: None,
    "list": lambda: x().tolist(),
    "text": lambda: "tokens",
    "no rows": lambda: x(0, 5, DIM),
    "rank 1": lambda: x(DIM),
    "rank 4": lambda: x(1, 2, 5, DIM),
    "width": lambda: x(2, 5, DIM + 1),
    "width 1": lambda: x(2, 5, 1),
    "ids": lambda: x(2, 5, DIM, dtype=torch.long),
    "bool": lambda: x(2, 5, DIM, dtype=torch.bool),
    "complex": lambda: x(2, 5, DIM, dtype=torch.complex64),
    "float64": lambda: x(2, 5, DIM, dtype=torch.float64),
    "bfloat16": lambda: x(2, 5, DIM, dtype=torch.bfloat16),
}
# of functions of any leading dims and of every dtype
FREE = {"no rows", "rank 4", "float64", "bfloat16"}


def memory(**options):
    return t.NeuralMemory(DIM, 4, **options)


def layer(kind):
    return kind(DIM, memory=titans_memory(DIM)) if kind is t.LMMLayer else kind(DIM, heads=2)


# name of the argument, the call, what of TOKENS it takes
CALLS = {
    "NeuralMemory": ("seq", lambda v: memory()(v), ()),
    "store_seq": ("store_seq", lambda v: memory()(x(), store_seq=v), ("None",)),
    "store_memories": ("seq", lambda v: memory().store_memories(v), ()),
    "retrieve_memories": ("seq", lambda v: memory().retrieve_memories(v, memory().init_weights(2)), ()),
    "MACLayer": ("x", lambda v: layer(t.MACLayer)(v), ()),
    "MAGLayer": ("x", lambda v: layer(t.MAGLayer)(v), ()),
    "MALLayer": ("x", lambda v: layer(t.MALLayer)(v), ()),
    "LMMLayer": ("x", lambda v: layer(t.LMMLayer)(v), ()),
    "SegmentedAttention": ("seq", lambda v: t.SegmentedAttention(DIM, 4, dim_head=4, heads=2)(v), ()),
    "output_gating": (
        "output_gating",
        lambda v: t.SegmentedAttention(DIM, 4, dim_head=4, heads=2)(x(), output_gating=v),
        ("None", "ids", "bool", "complex", "float64", "bfloat16"),
    ),
    "WindowAttention": ("x", lambda v: WindowAttention(DIM, 2, 4)(v, x(1, DIM)), ()),
    "SegmentAttention": ("x", lambda v: SegmentAttention(DIM, 2, 8)(v, x(), x(1, DIM), None), ()),
    "retrieved": ("retrieved", lambda v: SegmentAttention(DIM, 2, 8)(x(), v, x(1, DIM), None), ()),
    "Gate": ("attended", lambda v: Gate(DIM)(v, x()), ()),
    "remembered": ("remembered", lambda v: Gate(DIM)(x(), v), ()),
    "RMSNorm": ("x", lambda v: RMSNorm(DIM)(v), (*FREE, "rank 1")),
    "SymplecticGating": ("x", lambda v: t.SymplecticGating(DIM)(v), ("float64", "bfloat16")),
    "gate_trace": ("seq", lambda v: t.gate_trace(memory(use_symplectic_gating=True), v), ("float64", "bfloat16")),
    "MemoryMLP": ("x", lambda v: t.MemoryMLP(DIM, 2)(v), FREE),
    "FactorizedMemoryMLP": ("x", lambda v: t.FactorizedMemoryMLP(DIM, 2)(v), FREE),
    "MemorySwiGluMLP": ("x", lambda v: t.MemorySwiGluMLP(DIM)(v), FREE),
    "GatedResidualMemoryMLP": ("x", lambda v: t.GatedResidualMemoryMLP(DIM, 1)(v), FREE),
    "MemoryAttention": ("x", lambda v: t.MemoryAttention(DIM)(v), FREE),
    "ResidualNorm": ("x", lambda v: t.ResidualNorm(DIM, t.MemoryMLP(DIM, 1))(v), FREE),
    "DynamicModeDecomposition": (
        "x",
        lambda v: t.DynamicModeDecomposition()(v),
        (*FREE, "width", "width 1"),
    ),
    "AssocScan": ("(gates|inputs)", lambda v: t.AssocScan()(v, v), (*FREE, "width", "width 1")),
    "auxiliary_loss": ("surprises", lambda v: t.auxiliary_loss(v), ()),
    "mem_state_detach": ("state", lambda v: t.mem_state_detach(v), ()),
    "state": ("state", lambda v: memory()(x(), state=v), ("None",)),
    "load_peer_state_dict": ("state_dict", lambda v: t.load_peer_state_dict(memory(), v), ()),
    "module": ("module", lambda v: t.load_peer_state_dict(v, {}), ()),
    "diagnose": ("model", lambda v: t.diagnose(v, x()), ()),
    "traced memory": ("memory", lambda v: t.gate_trace(v, x()), ()),
    "calibrate_page_threshold": ("memory", lambda v: t.calibrate_page_threshold(v, x(), 0.5), ()),
    "plot_gate_trace": ("trace", lambda v: t.plot_gate_trace(v, "trace.png"), ()),
    "memories_of": ("model", memories_of, ()),
    "page_switches": ("model", page_switches, ()),
    "stop_storing": ("model", stop_storing, ()),
}
CASES = [(name, wrong) for name, (_, _, takes) in CALLS.items() for wrong in TOKENS if wrong not in takes]


@pytest.mark.parametrize(("name", "wrong"), CASES, ids=[f"{name}-{wrong}" for name, wrong in CASES])
def test_tokens(name, wrong):
    argument, call, _ = CALLS[name]
    with pytest.raises(ValueError, match=rf"^{argument}\S* must be .+, got "):
        call(TOKENS[wrong]())


IDS = {
    "None": lambda: None,
    "list": lambda: [[1, 2]],
    "no rows": lambda: torch.zeros(0, 5, dtype=torch.long),
    "no tokens": lambda: torch.zeros(2, 0, dtype=torch.long),
    "rank 1": lambda: torch.zeros(5, dtype=torch.long),
    "rank 3": lambda: torch.zeros(2, 5, 1, dtype=torch.long),
    "floats": lambda: torch.zeros(2, 5),
    "bool": lambda: torch.zeros(2, 5, dtype=torch.bool),
    "negative": lambda: torch.full((2, 5), -1),
    "too large": lambda: torch.full((2, 5), 16),
}


def models():
    mac = t.MemoryAsContextTransformer(num_tokens=16, dim=16, depth=1, segment_len=4, dim_head=8, heads=2)
    family = {kind: t.build_model(t.ModelConfig(variant=kind, **SMALL)) for kind in ("mac", "mag", "mal", "lmm")}
    return {"transformer": mac, **family, "baseline": t.build_model(t.ModelConfig(variant="baseline", **SMALL))}


MODELS = models()


@pytest.mark.parametrize("model", MODELS)
def test_ids(model):
    """Their range is looked at on a CPU; CUDA asserts it itself, where looking would make the host wait."""
    for wrong, ids in IDS.items():
        for call, argument in ((MODELS[model], "ids"), (lambda ids: MODELS[model].sample(ids, 9), "prompt")):
            with pytest.raises(ValueError, match=f"^{argument} must be ") as error:
                call(ids())
            assert "\n" not in str(error.value), wrong


@pytest.mark.parametrize("model", MODELS)
def test_calls_of_models(model):
    model, ids = MODELS[model], torch.zeros(2, 5, dtype=torch.long)
    for flag in ("return_loss", "return_cache"):
        for value in ("false", None, 1.5, 2):
            with pytest.raises(ValueError, match=f"^{flag} must be True or False, got {value!r}$"):
                model(ids, **{flag: value})
    for value in ("cache", 3, (), {}, ids):
        with pytest.raises(ValueError, match="^cache must be "):
            model(ids, cache=value)
    for name, values in {
        "seq_len": (0, -1, 1.5, None, "9", True),
        "temperature": (-1.0, float("nan"), float("inf"), None, "1", True),
        "filter_fn": (3, "min_p"),
        "filter_kwargs": (3, "min_p", [1]),
        "use_cache": ("false", None, 2),
        "show_progress": ("false", None, 2),
    }.items():
        for value in values:
            with pytest.raises(ValueError, match=refusal(name)):
                model.sample(ids, **{"seq_len": 9} | {name: value})
    with pytest.raises(TypeError, match="unknown_keyword"):
        model(ids, unknown_keyword=1)


def test_flags_of_calls():
    attention = t.SegmentedAttention(DIM, 4, dim_head=4, heads=2)
    calls = {
        "detach_mem_state": lambda v: memory()(x(), detach_mem_state=v),
        "return_surprises": lambda v: memory()(x(), return_surprises=v),
        "disable_flex_attn": lambda v: attention(x(), disable_flex_attn=v),
        "every_pair": lambda v: t.auxiliary_loss((x(), x()), every_pair=v),
    }
    for kind in (t.MACLayer, t.MAGLayer, t.MALLayer, t.LMMLayer):
        calls[kind.__name__] = lambda v, kind=kind: layer(kind)(x(), return_surprises=v)
    calls["store_memories"] = lambda v: memory().store_memories(x(), return_surprises=v)
    for name, call in calls.items():
        for value in ("false", None, 2, 0.5):
            flag = name if "_" in name and name != "store_memories" else "return_surprises"
            with pytest.raises(ValueError, match=f"^{flag} must be True or False, got {value!r}$"):
                call(value)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda v: min_p_filter(torch.zeros(2, 4), v), "min_p"),
        (lambda v: top_k_filter(torch.zeros(2, 4), v), "k"),
        (lambda v: top_p_filter(torch.zeros(2, 4), v), "p"),
        (lambda v: gumbel_sample(torch.zeros(2, 4), v), "temperature"),
        (lambda v: t.calibrate_page_threshold(memory(), x(), v), "target_switch_rate"),
    ],
)
def test_numbers_of_calls(call, name):
    for value in (None, "1", -1, float("nan"), float("inf"), [], object()):
        with pytest.raises(ValueError, match=refusal(name)):
            call(value)


def test_one_token_and_attention_without_tokens():
    """One token [b d] is a sequence to NeuralMemory alone; no tokens are one, too."""
    assert memory()(x(2, DIM))[0].shape == (2, 1, DIM)
    assert memory()(x(2, 0, DIM))[0].shape == (2, 0, DIM)
    for kind in (t.MACLayer, t.MAGLayer, t.MALLayer, t.LMMLayer):
        for shape in ((2, DIM), (2, 0, DIM)):
            with pytest.raises(ValueError, match=r"^x must be a floating point tensor \[b n 8\]"):
                layer(kind)(x(*shape))


def test_under_autocast_other_dtypes_are_taken():
    with torch.autocast("cpu", torch.bfloat16):
        for kind in (t.MACLayer, t.MAGLayer, t.MALLayer, t.LMMLayer):
            assert layer(kind)(x(dtype=torch.bfloat16))[0].shape == (2, 5, DIM)
        attention = t.SegmentedAttention(DIM, 4, dim_head=4, heads=2)
        assert attention(x(dtype=torch.bfloat16))[0].shape == (2, 5, DIM)


def test_a_users_memory_model_needs_no_dim():
    """Models of one's own need not say how wide their tokens are."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(DIM))

        def forward(self, tokens):
            return tokens @ self.weight

    assert memory(model=Own())(x())[0].shape == (2, 5, DIM)
