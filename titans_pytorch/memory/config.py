"""NeuralMemory's keywords as frozen objects, checked once.

The objects of projections and rates are beside their modules (projections.py, rates.py). The update rule holds its own
keywords (rules/titans.py). Gates and pages have gates/options.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from titans_pytorch.common.checks import positive_int, wrong
from titans_pytorch.engines.base import Engine
from titans_pytorch.engines.chunkwise import ChunkwiseEngine, unsolved
from titans_pytorch.engines.sequential import SequentialEngine
from titans_pytorch.memory_models import fast_form
from titans_pytorch.ops.positions import Reads
from titans_pytorch.rules.base import UpdateRule
from titans_pytorch.rules.titans import TitansRule

ENGINES = ("auto", "solve", "dual", "matrix", "sequential", "reference")  # "reference": the former name of "sequential"

#: Keywords of the gates package. A memory with all of them at their defaults never imports it.
GATE_KEYWORDS = (
    *("use_symplectic_gating", "symplectic_gate_kwargs", "use_dmd_gating", "combine_symplectic_and_dmd"),
    *("manifold_state_keyed_paging", "hierarchical_paging", "coarse_pages", "fine_pages", "hierarchy_mix"),
    *("kinetics_coupling", "kinetics_mix", "kinetics_eps", "num_pages", "symplectic_page_threshold"),
    *("page_switch_every", "dmd_window", "symplectic_gate", "page_router", "page_threshold_quantile"),
    *("page_threshold_window", "read_active_page_only"),
)


#: Keywords that do not change the meaning of a state: engines, initial values, settings that may change later.
NOT_OF_A_STATE = (
    *("engine", "use_accelerated_scan", "init_adaptive_step_bias", "init_momentum_bias", "init_decay_bias"),
    *("surprise_threshold", "symplectic_page_threshold", "default_model_kwargs"),
)

#: Attributes of the gates that a memory shows as its own, with their values without gates.
GATE_ATTRIBUTES = {
    "symplectic_gate": None,
    "symplectic_complexity_scale": None,
    "dmd_complexity_scale": None,
    "symplectic_page_threshold": 0.5,
    "page_switch_events": torch.tensor(0),  # without gates nothing counts
    "reads_one_page": False,
}


@dataclass(frozen=True)
class ChunkConfig:
    """Tokens of chunks and mini-batches.

    chunk_size: store chunk, or (retrieve, store). batch_size: tokens of a mini-batch, or None. kv_per_token: keys and
    values of a token. lookahead: pair each key with the next token's value.
    """

    chunk_size: Any
    batch_size: int | None
    kv_per_token: int
    lookahead: bool

    def __post_init__(self):
        size = self.chunk_size
        pair = size if isinstance(size, (tuple, list)) else (size, size)
        if len(pair) != 2:
            raise wrong("chunk_size", size, "a positive integer or a (retrieve, store) pair of them")
        pair = positive_int(pair[0], "chunk_size"), positive_int(pair[1], "chunk_size")
        object.__setattr__(self, "chunk_size", pair)
        mini_batch_chunks(self.batch_size, self.store)
        if positive_int(self.kv_per_token, "num_kv_per_token") * self.store == 1 and self.lookahead:
            takes = "chunks of at least two pairs (chunk_size * num_kv_per_token)"
            raise ValueError(f"store_with_lookahead_value needs {takes}")

    @property
    def store(self) -> int:
        """Tokens of a store chunk."""
        return self.chunk_size[1]

    @property
    def reads(self) -> Reads:
        """The map from queries to the entries that they read."""
        return Reads(*self.chunk_size)

    @property
    def pairs(self) -> int:
        """Key-value pairs of a chunk."""
        return self.store * self.kv_per_token - self.lookahead


def check_rate_keywords(given: Mapping[str, Any]) -> None:
    """Reject keywords of NeuralMemory that set a rate which another keyword switches off."""
    if not given["learned_step"]:
        for name in ("adaptive_step_transform", "init_adaptive_step_bias"):
            if given[name] is not None:
                raise ValueError(f"learned_step=False cannot be combined with {name}")
    if not given["forget_gate"]:
        if given["init_decay_bias"] is not None:
            raise ValueError("forget_gate=False cannot be combined with init_decay_bias")
        for name in ("decay_first", "use_symplectic_gating", "use_dmd_gating", "kinetics_coupling"):
            if given[name]:
                raise ValueError(f"forget_gate=False cannot be combined with {name}=True")
    if positive_int(given["surprise_window"], "surprise_window") > 1 and given["store_with_lookahead_value"]:
        raise ValueError("surprise_window above 1 cannot be combined with store_with_lookahead_value")


def mini_batch_chunks(batch_size: int | None, store_chunk: int, name: str = "batch_size") -> int | None:
    """Return the number of store chunks in a mini-batch; None if the whole sequence is one mini-batch."""
    if batch_size is None:
        return None
    if positive_int(batch_size, name) % store_chunk:
        raise wrong(name, batch_size, f"a multiple of the store chunk size, {store_chunk}")
    return batch_size // store_chunk


def choose_engine(engine: str, model, rule: UpdateRule, use_accelerated_scan: bool) -> Engine:
    """Return the engine that the keyword names. "auto": the chunkwise engine if the network and the rule allow it."""
    if engine not in ENGINES:
        raise wrong("engine", engine, f"one of {', '.join(ENGINES)}")
    form = fast_form(model)
    if engine in ("sequential", "reference") or (engine == "auto" and not (form and rule.has_closed_form)):
        return SequentialEngine(model, rule)
    if form is None:
        raise ValueError(f'engine="{engine}" needs a memory model with a method with_weights(x, weights)')
    if not isinstance(rule, TitansRule) or not rule.has_closed_form:
        raise ValueError(f'engine="{engine}" cannot be combined with update_rule {type(rule).__name__}')
    if engine == "dual" and rule.spectral_norm:
        raise ValueError('engine="dual" cannot be combined with spectral_norm_surprises, which acts on built weights')
    if engine == "solve":
        _check_solvable(unsolved(model, rule))
    return ChunkwiseEngine(model, rule, form == "taped", engine, use_accelerated_scan)


def _check_solvable(reason: str) -> None:
    """Raise ValueError if chunks cannot be written in one triangular solve. reason: why not; empty if they can."""
    if reason.startswith("the memory network"):
        needs = "a memory network of one matrix: MemoryMLP of depth 1, with mem_model_norm_add_residual=False"
        raise ValueError(f'engine="solve" needs {needs}')
    if reason:
        raise ValueError(f'engine="solve" cannot be combined with {reason}')
