"""Validate and normalise the arguments of a call."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from titans_pytorch.common.checks import Words, wrong
from titans_pytorch.engines.written import EarlierLayer, Written, given_entries
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.ops.earlier_tokens import EarlierTokens, earlier_tokens
from titans_pytorch.ops.modes import HALF, plain_only, under_autocast
from titans_pytorch.ops.positions import Reads
from titans_pytorch.rules.base import UpdateRule
from titans_pytorch.rules.rates import WriteRates


def as_views(seq: Tensor, store_seq: Tensor | None, dim: int, diff_views: bool) -> tuple[Tensor, Tensor]:
    """Return the query view [b n d] and the store view of a call, [b n d] or [2 b n d] (keys, values). A call may have
    no tokens, but needs rows.
    """
    shapes = f"[3 b n {dim}]" if diff_views else f"[b n {dim}] or one token [b {dim}]"
    given = tuple(_floating(seq, "seq", shapes).shape)
    if seq.ndim == 3 - (not diff_views):
        seq = seq.unsqueeze(-2)
    if seq.ndim != 3 + diff_views or given[-1] != dim or (diff_views and given[0] not in (1, 3)):
        raise wrong("seq", given, shapes)
    query = seq[0] if diff_views else seq
    if diff_views and given[0] == 1 and store_seq is None:
        raise wrong("seq", given, f"{shapes}, or the query view [1 b n {dim}] with a store_seq")
    if query.shape[0] == 0:
        raise wrong("seq", given, "at least one row")
    if store_seq is None:
        return query, seq[1:] if diff_views else seq
    store = as_store_view(store_seq, dim, diff_views)
    if store.shape[-3:-1] != query.shape[:2]:
        raise wrong("store_seq", tuple(store_seq.shape), f"as many rows and tokens as seq, {tuple(query.shape[:2])}")
    return query, store


def as_store_view(seq: Tensor, dim: int, diff_views: bool, name: str = "store_seq") -> Tensor:
    shapes = f"[2 b n {dim}]" if diff_views else f"[b n {dim}]"
    given = tuple(_floating(seq, name, shapes).shape)
    if seq.ndim == 2 + diff_views:
        seq = seq.unsqueeze(-2)
    if seq.ndim != 3 + diff_views or given[-1] != dim or (diff_views and given[0] != 2):
        raise wrong(name, given, shapes)
    if seq.shape[-3] == 0:
        raise wrong(name, given, "at least one row")
    return seq


def as_query_view(seq: Tensor, dim: int) -> Tensor:
    shapes = f"[b n {dim}]"
    given = tuple(_floating(seq, "seq", shapes).shape)
    if seq.ndim != 3 or given[-1] != dim:
        raise wrong("seq", given, shapes)
    if given[0] == 0:
        raise wrong("seq", given, "at least one row")
    return seq


def _floating(seq, name: str, shapes: str) -> Tensor:
    if not isinstance(seq, Tensor) or not seq.is_floating_point():
        got = seq.dtype if isinstance(seq, Tensor) else type(seq).__name__
        raise wrong(name, Words(got), f"a floating point tensor {shapes}")
    return seq


def check_dtype(seq: Tensor, layer: nn.Module, name: str) -> None:
    """Raise ValueError if tokens lack the dtype of the linear map that they enter. Skipped under autocast, and for
    layers that are quantised, adapted or hooked, which may take others.
    """
    weight = layer._parameters.get("weight")
    if weight is None or type(layer).forward is not nn.Linear.forward:
        return
    if layer._forward_pre_hooks or "forward" in vars(layer):
        return
    if weight.is_floating_point() and seq.dtype != weight.dtype and not under_autocast(seq.device):
        raise wrong(name, seq.dtype, f"{weight.dtype}, the dtype of the memory's parameters")


def checked_state(memory, state, expected: "StateShape") -> NeuralMemState:
    """Return the state of a call, checked to come from a memory of the same settings; for None an empty state."""
    if state is None:
        return NeuralMemState(0)
    if not isinstance(state, NeuralMemState):
        raise wrong("state", Words(type(state).__name__), "the NeuralMemState that the call before returned")
    memory.check_made_by_this(state)
    expected.check(state)
    if state.configuration is None:  # made by hand, not by a call
        check_for_rule(memory.engine.rule, state.weights, "state.weights")
        check_for_rule(memory.engine.rule, state.states and state.states[0], "state.states[0]")
    return state


def check_for_rule(rule: UpdateRule, weights: Mapping[str, Tensor] | None, name: str) -> None:
    """Reject fast weights given by hand that the update rule cannot continue from."""
    if weights is not None and type(rule).check_weights is not UpdateRule.check_weights:
        for key in weights:
            rule.check_weights(f"{name}[{key!r}]", weights[key])


@dataclass(frozen=True)
class StateShape:
    """The shapes that a state must have.

    shapes: name -> ((b h), ...). width: shape of the tokens without their length. tails: shapes of the convolutions'
    earlier inputs, field -> (tokens, channels), (0, 0) without.
    """

    chunk: int
    shapes: Mapping[str, tuple]
    order: int
    dtype: torch.dtype
    width: tuple[int, ...]
    tails: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def kept_in(self) -> torch.dtype:
        return torch.float32 if self.dtype in HALF else self.dtype

    def check(self, state: NeuralMemState) -> None:
        """Reject a state of another configuration, batch size or dtype."""
        if not isinstance(state.seq_index, int) or state.seq_index < 0 or state.seq_index % self.chunk:
            raise wrong("state.seq_index", state.seq_index, f"a multiple of the store chunk size, {self.chunk}")
        self._check_waiting(state)
        if state.weights is not None:
            self.check_weights(state.weights, "state.weights")
        if state.states is not None:
            self.check_states(state.states, "state.states")
        if state.read_weights is not None:
            self.check_weights(state.read_weights, "state.read_weights")
        self._check_rows(state)

    def _check_waiting(self, state: NeuralMemState) -> None:
        waiting, mask = state.cache_store_segment, state.cache_store_mask
        if waiting is not None:
            shape, rows = tuple(waiting.shape), self.width[-2]
            if waiting.ndim == len(self.width) + 1 and shape[-3] != rows:
                raise wrong("state", Words(f"one of {shape[-3]} rows"), f"one of {rows} rows, as seq has")
            if (*shape[:-2], shape[-1]) != self.width or shape[-2] >= self.chunk:
                takes = f"{(*self.width[:-1], 'k', self.width[-1])} with k < {self.chunk}, the store chunk size"
                raise wrong("state.cache_store_segment", shape, takes)
        if mask is not None and tuple(mask.shape) != (self.width[-2], state.position - state.seq_index):
            wanted = (self.width[-2], state.position - state.seq_index)
            raise wrong("state.cache_store_mask", tuple(mask.shape), f"{wanted}, the mask of the waiting tokens")

    def _check_rows(self, state: NeuralMemState) -> None:
        b, d = self.width[-2:]
        wanted = {"gate_tokens": (b, "k", d), "recent_complexity": (b, "k")}
        wanted |= {"active_page_indices": (b,), "last_switch": (b,), "read_page": (b,)}
        wanted |= {"last_token": (b, 1, d)} | {name: (b, *tail) for name, tail in self.tails.items()}
        for name, shape in wanted.items():
            value = getattr(state, name)
            if value is None:
                continue
            got = tuple(value.shape)
            if len(got) != len(shape) or any(w not in ("k", g) for w, g in zip(shape, got, strict=True)):
                raise wrong(f"state.{name}", got, str(shape))

    def check_weights(self, weights, name: str, entries: bool = False) -> None:
        check_weights(weights, self.shapes, name, entries, self.kept_in)

    def has_entries(self, weights, name: str) -> bool:
        """Return whether weights have one more dim than parameters: one entry per chunk."""
        _check_names(weights, self.shapes, name)
        return all(weights[key].ndim == len(shape) + 1 for key, shape in self.shapes.items())

    def check_states(self, states, name: str) -> None:
        if not isinstance(states, tuple | list) or len(states) != 2:
            raise wrong(name, Words(type(states).__name__), "a pair: (memory, momentum)")
        memory, momentum = states
        self.check_weights(memory, f"{name}[0]")
        orders = {k: (self.order, *v) for k, v in self.shapes.items()} if self.order else {}
        check_weights(momentum, orders, f"{name}[1]", dtype=self.kept_in)


def check_weights(weights, shapes: Mapping[str, tuple], name: str, entries: bool = False, dtype=None):
    """Return `weights` if they map names to tensors of exactly these shapes; `entries`: with a further dim 1."""
    if not entries and isinstance(weights, Mapping) and weights.keys() == shapes.keys():
        given = [(weights[key], shape) for key, shape in shapes.items()]
        if all(isinstance(v, Tensor) and v.shape == shape and dtype in (None, v.dtype) for v, shape in given):
            return weights  # the case of almost every call
    _check_names(weights, shapes, name)
    for key, wanted in shapes.items():
        value = weights[key]
        shape = tuple(value.shape)
        if shape[:1] + shape[1 + entries :] != tuple(wanted) or len(shape) != len(wanted) + entries:
            takes = f"shape {(wanted[0], 'entries', *wanted[1:]) if entries else tuple(wanted)}"
            raise wrong(f"{name}[{key!r}]", shape, takes)
        if dtype is not None and value.dtype != dtype:
            raise wrong(f"{name}[{key!r}]", value.dtype, f"{dtype}, the dtype of the memory")
    return weights


def _check_names(weights, shapes: Mapping[str, tuple], name: str) -> None:
    if not isinstance(weights, Mapping) and not hasattr(weights, "keys"):
        raise wrong(name, Words(type(weights).__name__), "a mapping from parameter names to tensors")
    names = list(weights.keys())
    if set(names) != set(shapes):
        got = ", ".join(map(str, names)) or "none"
        raise wrong(name, Words(f"the parameters {got}"), f"the parameters {', '.join(shapes) or 'none'}")
    for key in shapes:
        if not isinstance(weights[key], Tensor):
            raise wrong(f"{name}[{key!r}]", Words(type(weights[key]).__name__), "a tensor")


def check_mask(mask, batch: int, n: int, name: str) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != (batch, n):
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise wrong(name, Words(got), f"a bool tensor of shape {(batch, n)}")


@dataclass(frozen=True)
class Texts:
    """Where tokens are in the rows of a call, and where texts begin. present: bool [b n]. resets: bool [b n], or None
    where no text begins."""

    present: Tensor
    resets: Tensor | None

    def earlier(self, back: int) -> EarlierTokens:
        """Return the `back` tokens before each token, padding and other texts left out."""
        none = torch.zeros_like(self.present) if self.resets is None else self.resets
        return earlier_tokens(self.present, none, back)

    def hide(self, x: Tensor) -> Tensor:
        """Return x [.. b n d] with zeros at padding, whatever stands there."""
        return x.masked_fill(~self.present.unsqueeze(-1), 0.0)

    def of_pairs(self, x: Tensor, pairs: int) -> Tensor:
        """Return a value of each pair [b h n*p], 0 at padding."""
        return x.masked_fill(~self.present.repeat_interleave(pairs, dim=1).unsqueeze(1), 0.0)

    def applied(self, rates: WriteRates, heads: int, pairs: int) -> WriteRates:
        """Return the rates of chunks of one token, such that padding changes nothing and texts begin where they do."""

        def per_head(mask: Tensor) -> Tensor:
            return mask.repeat_interleave(heads, dim=0)

        present = per_head(self.present)
        resets = None if self.resets is None else per_head(self.resets)
        return replace(rates.masked(present.unsqueeze(-1).expand(-1, -1, pairs)), active=present, resets=resets)


def texts_of(memory, token_mask: Tensor | None, resets: Tensor | None, b: int, n: int, mini_batch) -> Texts | None:
    """Return where tokens are and texts begin; None without the arguments. mini_batch: chunks of one, or None.

    Raises:
        ValueError: for another shape, or a memory in which rows need common boundaries.
    """
    check_mask(token_mask, b, n, "token_mask")
    if resets is not None:
        resets = _resets(resets, b, n)
    if token_mask is None and resets is None:
        return None
    name = "token_mask" if resets is None else "resets"
    if memory.chunk_config.chunk_size != (1, 1):
        raise ValueError(f"{name} needs a memory with chunk_size = 1: a row's chunks would hold another row's padding")
    if mini_batch not in ((None, 1) if resets is None else (1,)):
        takes = "batch_size = 1, or None" if resets is None else "batch_size = 1"
        raise ValueError(f"{name} needs a memory with {takes}: mini-batches begin at the same positions in all rows")
    if memory.gates is not None:
        raise ValueError(f"{name} cannot be combined with gates and pages, which look at neighbouring tokens")
    if memory.earlier_pairs:
        raise ValueError(f"{name} cannot be combined with surprise_window, whose earlier pairs stand side by side")
    if token_mask is None:
        assert resets is not None
        token_mask = torch.ones_like(resets)
    return Texts(token_mask, resets)


def _resets(resets: Tensor, b: int, n: int) -> Tensor:
    """Return where texts begin, bool [b n], also from cu_seqlens."""
    takes = f"a bool tensor of shape {(b, n)}, or the bounds of texts in the flattened rows, integers 0 .. {b * n}"
    if not isinstance(resets, Tensor):
        raise wrong("resets", Words(type(resets).__name__), takes)
    if resets.dtype == torch.bool and tuple(resets.shape) == (b, n):
        return resets
    if resets.ndim != 1 or resets.dtype not in (torch.int32, torch.int64) or len(resets) < 2:
        raise wrong("resets", Words(f"{resets.dtype} {tuple(resets.shape)}"), takes)
    if resets.device.type == "cpu" and not plain_only():  # where it needs no sync
        low, high = (int(bound) for bound in resets.aminmax())
        if low < 0 or high > b * n:
            raise wrong("resets", Words(f"the bound {low if low < 0 else high}"), takes)
    starts = torch.zeros(b * n + 1, dtype=torch.bool, device=resets.device)
    return starts.index_fill(0, resets.long(), True)[: b * n].view(b, n)


def join_masks(mask: Tensor | None, state: NeuralMemState, batch: int, n: int) -> Tensor | None:
    """Return the mask of the waiting and the new tokens [b k+n], or None if nothing is masked."""
    before = state.cache_store_mask
    if mask is not None:
        waiting = state.position - state.seq_index
        before = mask.new_ones(batch, waiting) if before is None else before
    elif before is not None:
        mask = before.new_ones(batch, n)
    return None if before is None or mask is None else torch.cat((before, mask), dim=1)


def earlier_layer(prev_weights, expected: StateShape, first: int, count: int) -> EarlierLayer:
    """Return an earlier layer's updates, from chunk `first` on. A plain mapping begins at this call's first chunk."""
    written = _written_of(prev_weights, expected, first)
    if written.first > first or written.last < first + count - 1:
        got = Words(f"the memory before chunks {written.first} to {written.last}")
        raise wrong("prev_weights", got, f"updates that cover chunks {first} to {first + count - 1}, counted from 0")
    return EarlierLayer(written)


def _written_of(prev_weights, expected: StateShape, first: int) -> Written:
    source = getattr(prev_weights, "source", None)
    if source is None:
        expected.check_weights(prev_weights, "prev_weights", entries=True)
        own = getattr(prev_weights, "first_chunk", None)
        return given_entries({k: prev_weights[k] for k in expected.shapes}, first if own is None else own)
    if dict(source.shapes) != dict(expected.shapes):
        got, takes = (", ".join(f"{k} {v}" for k, v in shapes.items()) for shapes in (source.shapes, expected.shapes))
        raise wrong("prev_weights", Words(f"the parameters {got}"), f"the parameters {takes}")
    return source


class EarlierQueries(NamedTuple):
    """Earlier queries that a read needs; fields of NeuralMemState, described there."""

    query_group: Tensor | None = None
    query_conv: Tensor | None = None


def with_earlier_queries(queries: Tensor, earlier: Tensor | None, position: int, reads: Reads) -> tuple[Tensor, int]:
    """Return the read group's earlier queries with `queries` [b h n d] behind them, and the first position."""
    wanted = reads.earlier(position)
    got = 0 if earlier is None else earlier.shape[2]
    if got != wanted:
        raise wrong("state.query_group", Words(f"{got} earlier queries"), f"{wanted} at position {position}")
    return queries if earlier is None else torch.cat((earlier, queries), dim=2), position - got


def older_page(state: NeuralMemState) -> Tensor:
    """Return the page of the unfinished read group's entry, if that is older than the state's own."""
    if state.read_page is None:
        raise wrong("state.read_page", None, "the page that goes with read_weights, as the call before returned it")
    return state.read_page


def older_weights(state: NeuralMemState, entry: int):
    """Return the fast weights of the unfinished read group's entry, if they are older than the state's own."""
    if state.read_weights is None:
        raise wrong("state.read_weights", None, f"the memory after {entry} chunks, as the call before returned it")
    return state.read_weights
