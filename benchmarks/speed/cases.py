"""The cases: the named configurations with their goals, and the sweep over lengths and chunks.

A case is plain data, so that a worker in any environment can build it: {"model": [name, kwargs]} in the keyword
arguments stands for that memory network of titans_pytorch.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from harness.operations import (
    MemoryShape,
    attention_operations,
    memory_forms,
    memory_operations,
    transformer_operations,
)

QUANTITIES = ("forward", "train", "memory", "decode")
DEFAULT_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
DEFAULT_CHUNKS = (1, 4, 16, 64, 256)


@dataclass(frozen=True)
class Goal:
    """quantity: "forward", "train", "decode": at least `target` times as fast as the peer; "memory": at most `target`
    of the peer's memory over idle; "gigabytes": at most so many over idle, whatever the peer takes."""

    quantity: str
    target: float


@dataclass(frozen=True)
class Case:
    """kind: "memory" (NeuralMemory(**kwargs) on [batch tokens dim]) or "transformer" (MemoryAsContextTransformer(
    **kwargs) on ids [batch tokens], which decodes with its cache from `prompt` ids up to `tokens`)."""

    name: str
    title: str
    kind: str
    kwargs: dict[str, Any]
    batch: int
    tokens: int
    quantities: tuple[str, ...] = QUANTITIES
    goals: tuple[Goal, ...] = ()
    prompt: int = 16
    sweep: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def anchor(self) -> int | None:
        return self.kwargs.get("batch_size" if self.kind == "memory" else "neural_memory_batch_size")

    @property
    def chunk(self) -> int:
        return self.kwargs["chunk_size" if self.kind == "memory" else "neural_memory_segment_len"]

    def gate_tokens(self) -> int:
        """Return a length of more than one mini-batch (or more than a solve window of any engine) that ends on a
        chunk.
        """
        window = self.anchor or 128
        whole = window + max(2 * self.chunk, window // 4)
        return min(self.tokens, -(-whole // self.chunk) * self.chunk)


def memory_model(dim: int, depth: int, expansion_factor: float) -> dict[str, Any]:
    return {"model": ["MemoryMLP", {"dim": dim, "depth": depth, "expansion_factor": expansion_factor}]}


TRAIN_MAC_MEMORY = {
    "dim": 384,
    "dim_head": 64,
    "heads": 4,
    "chunk_size": 4,
    "batch_size": 128,
    "qk_rmsnorm": True,
    "default_step_transform_max_lr": 0.1,
    "model": memory_model(64, 2, 2.0),
}
ENWIK8_TRANSFORMER = {
    "num_tokens": 256,
    "dim": 384,
    "depth": 8,
    "heads": 8,
    "dim_head": 64,
    "ff_mult": 4,
    "num_residual_streams": 4,
    "segment_len": 32,
    "sliding_window_attn": True,
    "num_persist_mem_tokens": 4,
    "num_longterm_mem_tokens": 4,
    "neural_memory_layers": [2, 4, 6],
    "neural_memory_segment_len": 4,
    "neural_memory_batch_size": 128,
    "neural_mem_gate_attn_output": False,
    "neural_mem_weight_residual": True,
    "neural_memory_qkv_receives_diff_views": True,
    "neural_memory_model": memory_model(64, 2, 2.0),
    "neural_memory_kwargs": {
        "dim_head": 64,
        "heads": 4,
        "attn_pool_chunks": True,
        "qk_rmsnorm": True,
        "momentum": True,
        "momentum_order": 1,
        "default_step_transform_max_lr": 0.1,
        "per_parameter_lr_modulation": True,
        "spectral_norm_surprises": True,
    },
}
SAMPLING_TRANSFORMER = {
    "num_tokens": 256,
    "dim": 128,
    "depth": 4,
    "heads": 4,
    "dim_head": 32,
    "segment_len": 32,
    "num_persist_mem_tokens": 4,
    "num_longterm_mem_tokens": 4,
    "neural_memory_layers": [2, 4],
    "neural_memory_segment_len": 4,
    "neural_memory_batch_size": 128,
    "neural_memory_model": memory_model(32, 2, 2.0),
    "neural_memory_kwargs": {"dim_head": 32, "heads": 4, "qk_rmsnorm": True, "default_step_transform_max_lr": 0.1},
}

NAMED = (
    Case(
        "readme",
        "README: dim 384, chunk 64",
        "memory",
        {"dim": 384, "chunk_size": 64},
        batch=2,
        tokens=1024,
        goals=(Goal("forward", 6), Goal("train", 8), Goal("memory", 1 / 4)),
    ),
    Case(
        "train-mac-memory",
        "train_mac memory: 4 heads of 64, chunk 4, batch 128, qk norm",
        "memory",
        TRAIN_MAC_MEMORY,
        batch=4,
        tokens=512,
        goals=(Goal("forward", 25), Goal("train", 25), Goal("memory", 1 / 8)),
    ),
    Case(
        "paper-rule",
        "the paper's rule: the same with chunk 1, batch 64",
        "memory",
        {**TRAIN_MAC_MEMORY, "chunk_size": 1, "batch_size": 64},
        batch=1,
        tokens=512,
        goals=(Goal("forward", 50), Goal("train", 50), Goal("memory", 1 / 8)),
    ),
    Case(
        "train-mac-spectral",
        "train_mac memory with pooled chunks, modulation, spectral norm",
        "memory",
        {
            **TRAIN_MAC_MEMORY,
            "attn_pool_chunks": True,
            "per_parameter_lr_modulation": True,
            "spectral_norm_surprises": True,
        },
        batch=2,
        tokens=512,
        goals=(Goal("train", 3), Goal("memory", 1 / 4)),
    ),
    Case(
        "enwik8-transformer",
        "transformer of train_mac's enwik8 preset, one sequence",
        "transformer",
        ENWIK8_TRANSFORMER,
        batch=1,
        tokens=512,
        quantities=("forward", "train", "memory"),
        goals=(Goal("train", 2), Goal("memory", 1 / 4)),
    ),
    Case(
        "enwik8-batch-4",
        "the same, four sequences: the preset's own batch",
        "transformer",
        ENWIK8_TRANSFORMER,
        batch=4,
        tokens=512,
        quantities=("train", "memory"),
        goals=(Goal("gigabytes", 24),),
    ),
    Case(
        "cached-sampling",
        "cached sampling: dim 128, depth 4, memory in layers 2 and 4",
        "transformer",
        SAMPLING_TRANSFORMER,
        batch=1,
        tokens=256,
        quantities=("decode",),
        goals=(Goal("decode", 10),),
    ),
)


def sweep_case(tokens: int, chunk: int) -> Case:
    """Return the train_mac memory at another chunk size, one sequence; mini-batches of 128 tokens, or of one chunk."""
    kwargs = {**TRAIN_MAC_MEMORY, "chunk_size": chunk, "batch_size": -(-128 // chunk) * chunk}
    sweep = {"tokens": tokens, "chunk": chunk}
    return Case(f"sweep-{tokens}-{chunk}", f"{tokens} tokens, chunk {chunk}", "memory", kwargs, 1, tokens, sweep=sweep)


def choose_cases(names: Sequence[str] | None, lengths: Sequence[int], chunks: Sequence[int]) -> list[Case]:
    """Return cases by name; "named" and "sweep" stand for all of their kind. None: everything."""
    named = {case.name: case for case in NAMED}
    swept = {case.name: case for case in (sweep_case(n, c) for c in chunks for n in lengths if n >= c)}
    groups = {"named": list(named), "sweep": list(swept)}
    chosen: dict[str, Case] = {}
    for name in ("named", "sweep") if names is None else names:
        for member in groups.get(name, [name]):
            if member not in named and member not in swept:
                known = ", ".join([*groups, *named])
                raise ValueError(
                    f"cases must be {known}, or sweep-LENGTH-CHUNK of the lengths and chunks, got {name!r}"
                )
            chosen[member] = {**named, **swept}[member]
    return list(chosen.values())


def shortened(case: Case, most: int = 128) -> Case:
    """Shorten a case to one sequence of at most `most` tokens, whole chunks, for a quick run."""
    tokens = max(min(case.tokens, most) // case.chunk, 1) * case.chunk
    return replace(case, batch=1, tokens=tokens, goals=())


def as_attention(case: Case) -> Case:
    """Return the third arm: full attention in place of the memory. For a memory, one layer of the same width; for a
    transformer, the same without memories and with one segment over all tokens."""
    kwargs = case.kwargs
    if case.kind == "memory":
        inner = kwargs.get("heads", 1) * kwargs.get("dim_head", kwargs["dim"])
        head = next(h for h in (64, inner) if inner % h == 0)
        return replace(case, kind="attention", kwargs={"dim": kwargs["dim"], "heads": inner // head, "dim_head": head})
    kept = {k: v for k, v in kwargs.items() if not k.startswith("neural_mem") and k != "sliding_window_attn"}
    kept |= {"segment_len": case.tokens, "num_longterm_mem_tokens": 0, "neural_memory_layers": []}
    return replace(case, kwargs=kept)


def operations(case: Case) -> dict[str, int]:
    """Count the forward operations needed, in parts (see harness/operations.py)."""
    if case.kind == "attention":
        k = case.kwargs
        return {"attention": attention_operations(k["dim"], k["heads"], k["dim_head"], case.batch, case.tokens)}
    if case.kind == "memory":
        return memory_operations(memory_shape(case.kwargs), case.batch, case.tokens)
    shape = None
    if case.kwargs.get("neural_memory_layers"):
        k = case.kwargs
        inner = {**k["neural_memory_kwargs"], "dim": k["dim"], "model": k["neural_memory_model"]}
        inner |= {"chunk_size": k["neural_memory_segment_len"], "batch_size": k["neural_memory_batch_size"]}
        inner["accept_weight_residual"] = k.get("neural_mem_weight_residual", False)
        shape = memory_shape(inner)
    return transformer_operations(case.kwargs, shape, case.batch, case.tokens)


def operations_by_form(case: Case) -> dict[str, int]:
    """Count the operations of a memory's writes and reads in each exact form, as an engine of that form needs them."""
    if case.kind != "memory":
        return {}
    shape = memory_shape(case.kwargs)
    forms = memory_forms(shape, case.tokens)
    return {name: case.batch * shape.heads * sum(form[name] for form in forms) for name in forms[0]}


def memory_shape(kwargs: dict[str, Any]) -> MemoryShape:
    """Return the MemoryShape of NeuralMemory(**kwargs) with an MLP as memory network."""
    dim_head = kwargs.get("dim_head", kwargs["dim"])
    model = kwargs.get("model", memory_model(dim_head, 2, 4.0))["model"][1]
    hidden = int(model["dim"] * model["expansion_factor"])
    widths = (model["dim"], *(hidden,) * (model["depth"] - 1), model["dim"])
    weights = tuple(zip(widths[:-1], widths[1:], strict=True))
    return MemoryShape(
        dim=kwargs["dim"],
        chunk=kwargs["chunk_size"],
        weights=weights,
        heads=kwargs.get("heads", 1),
        dim_head=dim_head,
        anchor=kwargs.get("batch_size"),
        momentum_order=kwargs.get("momentum_order", 1) if kwargs.get("momentum", True) else 0,
        attn_pool=kwargs.get("attn_pool_chunks", False),
        modulated=(len(weights) + 1) if kwargs.get("per_parameter_lr_modulation") else 0,
        spectral=kwargs.get("spectral_norm_surprises", False),
        residual_mix=kwargs.get("accept_weight_residual", False),
    )
