"""What NeuralMemory is called with, checked at the door and brought into one form."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import wrong
from .engines.run import ResidualSource, Run, built_run
from .memory_state import NeuralMemState

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Views:
    """query [b n d] and store [b n d], or [2 b n d]: key and value views."""

    query: Tensor
    store: Tensor

    @property
    def batch(self) -> int:
        return self.query.shape[0]


def as_views(seq: Tensor, store_seq: Tensor | None, dim: int, diff_views: bool) -> Views:
    """The query view and the store view of a call."""
    shapes = f"[3 b n {dim}]" if diff_views else f"[b n {dim}] or one token [b {dim}]"
    seq = _floating(seq, "seq", shapes)
    if seq.ndim == 3 - (not diff_views):
        seq = seq.unsqueeze(-2)
    if seq.ndim != 3 + diff_views or seq.shape[-1] != dim or (diff_views and seq.shape[0] not in (1, 3)):
        raise wrong("seq", tuple(seq.shape), shapes)
    query = seq[0] if diff_views else seq
    if diff_views and seq.shape[0] == 1 and store_seq is None:
        raise wrong("seq", tuple(seq.shape), f"{shapes}, or the query view [1 b n {dim}] with a store_seq")
    store = (seq[1:] if diff_views else seq) if store_seq is None else as_store_view(store_seq, dim, diff_views)
    if store.shape[-3:-1] != query.shape[:2]:
        raise wrong("store_seq", tuple(store.shape), f"as many rows and tokens as seq, {tuple(query.shape[:2])}")
    return Views(query, store)


def as_store_view(seq: Tensor, dim: int, diff_views: bool) -> Tensor:
    shapes = f"[2 b n {dim}]" if diff_views else f"[b n {dim}]"
    seq = _floating(seq, "store_seq", shapes)
    if seq.ndim == 2 + diff_views:
        seq = seq.unsqueeze(-2)
    if seq.ndim != 3 + diff_views or seq.shape[-1] != dim or (diff_views and seq.shape[0] != 2):
        raise wrong("store_seq", tuple(seq.shape), shapes)
    return seq


def as_query_view(seq: Tensor, dim: int) -> Tensor:
    shapes = f"[b n {dim}]"
    seq = _floating(seq, "seq", shapes)
    if seq.ndim != 3 or seq.shape[-1] != dim:
        raise wrong("seq", tuple(seq.shape), shapes)
    return seq


def _floating(seq, name: str, shapes: str) -> Tensor:
    if not isinstance(seq, Tensor) or not seq.is_floating_point():
        got = seq.dtype if isinstance(seq, Tensor) else type(seq).__name__
        raise wrong(name, got, f"a floating point tensor {shapes}")
    return seq


def memory_dtype(x: Tensor) -> Tensor:
    """The memory is kept in float32 at least: sums over thousands of small updates vanish in half precision."""
    return x.float() if x.dtype in HALF and not torch.is_autocast_enabled(x.device.type) else x


def check_state(state, shapes: Mapping[str, tuple], order: int, dtype: torch.dtype, width: tuple[int, ...]) -> None:
    """A state of another configuration, batch size or dtype is refused. shapes: name -> ((b h), ...); width: the shape
    of the tokens less their length."""
    if not isinstance(state, NeuralMemState):
        raise wrong("state", type(state).__name__, "the NeuralMemState that the call before returned")
    waiting = state.cache_store_segment
    if waiting is not None and (*waiting.shape[:-2], waiting.shape[-1]) != width:
        takes = f"tokens of shape {(*width[:-1], 'waiting', width[-1])}, as the call's"
        raise wrong("state.cache_store_segment", tuple(waiting.shape), takes)
    dtype = torch.float32 if dtype in HALF else dtype
    if state.weights is not None:
        check_weights(state.weights, shapes, "state.weights", dtype=dtype)
    if state.states is not None:
        memory, momentum = state.states
        check_weights(memory, shapes, "state.states[0]", dtype=dtype)
        wanted = {k: (order, *v) for k, v in shapes.items()} if order else {}
        check_weights(momentum, wanted, "state.states[1]", dtype=dtype)


def check_weights(weights, shapes: Mapping[str, tuple], name: str, entries: bool = False, dtype=None):
    """name -> tensor of exactly these shapes; with `entries`, of a further dim 1."""
    if not isinstance(weights, Mapping) and not hasattr(weights, "keys"):
        raise wrong(name, type(weights).__name__, "a mapping from parameter names to tensors")
    names = set(weights.keys())
    if names != set(shapes):
        raise wrong(name, f"parameters {sorted(names)}", f"parameters {sorted(shapes)}")
    for key, wanted in shapes.items():
        value = weights[key]
        shape = tuple(value.shape)
        if shape[:1] + shape[1 + entries :] != tuple(wanted) or len(shape) != len(wanted) + entries:
            takes = f"shape {(wanted[0], 'entries', *wanted[1:]) if entries else tuple(wanted)}"
            raise wrong(f"{name}[{key!r}]", shape, takes)
        if dtype is not None and value.dtype != dtype:
            raise wrong(f"{name}[{key!r}]", value.dtype, f"{dtype}, the dtype of the memory")
    return weights


def join_masks(mask: Tensor | None, state: NeuralMemState, batch: int, n: int) -> Tensor | None:
    """The mask of the waiting and the new tokens [b k+n], or None if nothing is masked."""
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (batch, n)):
        raise wrong("store_mask", f"{mask.dtype} {tuple(mask.shape)}", f"a bool tensor of shape {(batch, n)}")
    waiting = state.position - state.seq_index
    if mask is None and state.cache_store_mask is None:
        return None
    device = state.cache_store_mask.device if mask is None else mask.device
    before = state.cache_store_mask
    before = torch.ones(batch, waiting, dtype=torch.bool, device=device) if before is None else before
    now = torch.ones(batch, n, dtype=torch.bool, device=device) if mask is None else mask
    return torch.cat((before, now), dim=1)


def residual_source(prev_weights, shapes: Mapping[str, tuple], first: int, count: int) -> ResidualSource | None:
    """An earlier layer's updates, from chunk `first` on. A plain mapping begins at this call's first chunk."""
    if prev_weights is None or count == 0:
        return None
    run = _source_run(prev_weights, shapes, first)
    if run.first > first or run.last < first + count - 1:
        raise wrong(
            "prev_weights",
            f"the memory before chunks {run.first} to {run.last}",
            f"chunks {first} to {first + count - 1}",
        )
    return ResidualSource(run)


def _source_run(prev_weights, shapes: Mapping[str, tuple], first: int) -> Run:
    if getattr(prev_weights, "source", None) is None:
        check_weights(prev_weights, shapes, "prev_weights", entries=True)
        first = getattr(prev_weights, "first_chunk", first)
        return built_run({k: prev_weights[k] for k in shapes}, first)
    if prev_weights.source.shapes != dict(shapes):
        raise wrong("prev_weights", f"parameters {prev_weights.source.shapes}", f"parameters {dict(shapes)}")
    return prev_weights.source


def group_progress(position: int, group: int) -> int:
    """How many queries before `position` read the same memory as the one at it (group 0 lacks its first slot)."""
    return position - max((position + 1) // group * group - 1, 0)


def with_earlier_queries(queries: Tensor, earlier: Tensor | None, position: int, group: int) -> tuple[Tensor, int]:
    """queries [b h n d] behind the earlier ones of their read group, and the position of the first."""
    wanted = group_progress(position, group)
    got = 0 if earlier is None else earlier.shape[2]
    if got != wanted:
        raise wrong("state.query_group", f"{got} earlier queries", f"{wanted} at position {position}")
    return (torch.cat((earlier, queries), dim=2) if got else queries), position - got


def older_window(state: NeuralMemState, entry: int, engine):
    """The memory of the unfinished read group, older than the state's own."""
    if state.read_weights is None:
        raise wrong("state.read_weights", None, f"the memory after {entry} chunks, as the call before returned it")
    return engine.still(entry, state.read_weights)
