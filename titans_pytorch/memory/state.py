"""NeuralMemState: the state that one call returns and the next one takes.

Letters: b batch, h heads, d features, k waiting tokens (fewer than a chunk), o momentum order, i chunk index.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_pytorch.common.checks import Words, of_kind, wrong
from titans_pytorch.common.identity import check_identity
from titans_pytorch.engines.lazy import LazyTensors

# fields that are tensors of rows
ROWS = (
    "active_page_indices",
    "cache_store_mask",
    "query_group",
    "gate_tokens",
    "last_switch",
    "recent_complexity",
    "query_conv",
    "store_conv",
    "last_token",
    "read_page",
    "earlier_pairs",
)


class NeuralMemState(NamedTuple):
    """The state of a NeuralMemory between calls. No call modifies a state that it is given.

    Save it with torch.save, or as a TensorDict. If it has an autograd graph, call `mem_state_detach` first.

    seq_index: tokens written so far, a multiple of the chunk; the next token's position is this plus the waiting
        tokens.
    weights: name -> [(b h) ...], the mini-batch start weights.
    cache_store_segment: tokens waiting for their chunk [b k d] ([2 b k d] with diff views).
    states: (fast weights, momentum): name -> [(b h) ...] and name -> [o (b h) ...] (empty without momentum).
    updates: name -> [(b h) (chunks + 1) ...], the fast weights before each chunk of the last call and after it; built
        when read.
    active_page_indices: long [b], the page being written (pages only).
    cache_store_mask: [b k] bool, the store mask of the waiting tokens; None if nothing was masked.
    query_group: [b h k d], earlier queries of the unfinished read group (memory networks that are not tokenwise only).
    read_weights: name -> [(b h) ...], the fast weights that the unfinished read group reads, if older than `states` (a
        retrieve chunk that is not the store chunk only).
    gate_tokens: [b k d], the last written tokens, normalised, as many as gates depend on (gates only).
    last_switch: long [b], the switch window of the last switch, -1 for none (page_switch_every only).
    recent_complexity: [b k], complexities of the last chunks (page_threshold_quantile only).
    query_conv: [b kernel-1 w], last inputs of the queries' convolution. store_conv: [b kernel-1 2 w u], last inputs of
        the keys' convolution, then of the values', of written tokens (qkv_conv_kernel only). None before the first.
    last_token: [b 1 d], the last written token, normalised (surprise_source = "prediction" only).
    read_page: long [b], the page that was active in read_weights (read_active_page_only only).
    earlier_pairs: [b h k 2d+1], the last key-value pairs, each with a 1 if it was written, else 0, and with the bound
        of its inner loss if the rule has one (surprise_window only).
    configuration: JSON, the settings of the memory that made the state; a memory of other settings rejects it. None for
        a state made by hand (or by `_replace(configuration=None)`); then only shapes are checked.
    """

    seq_index: int
    weights: Mapping[str, Tensor] | None = None
    cache_store_segment: Tensor | None = None
    states: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None
    updates: Mapping[str, Tensor] | None = None
    active_page_indices: Tensor | None = None
    cache_store_mask: Tensor | None = None
    query_group: Tensor | None = None
    read_weights: Mapping[str, Tensor] | None = None
    gate_tokens: Tensor | None = None
    last_switch: Tensor | None = None
    recent_complexity: Tensor | None = None
    query_conv: Tensor | None = None
    store_conv: Tensor | None = None
    last_token: Tensor | None = None
    read_page: Tensor | None = None
    earlier_pairs: Tensor | None = None
    configuration: str | None = None

    @property
    def position(self) -> int:
        """Absolute position of the next token."""
        waiting = 0 if self.cache_store_segment is None else self.cache_store_segment.shape[-2]
        return self.seq_index + waiting

    def to_tensordict(self, batch: int | None = None):
        """Return a TensorDict of batch size [batch] with everything but `updates`, to save, stack or select rows.

        batch: number of rows. Only a state made by hand needs it; others know theirs.
        """
        from tensordict import TensorDict

        rows = batch if self.cache_store_segment is None else self.cache_store_segment.shape[-3]
        if rows is None or batch not in (None, rows):
            raise wrong("batch", batch, f"the number of rows{'' if rows is None else f', {rows}'}")
        batch = rows
        out: dict[str, Any] = {"seq_index": torch.full((batch,), self.seq_index)}
        for name in ROWS:
            if (value := getattr(self, name)) is not None:
                out[name] = value
        if (waiting := self.cache_store_segment) is not None:
            out["cache_store_segment"] = waiting if waiting.ndim == 3 else waiting.transpose(0, 1)
        for name in ("weights", "read_weights"):
            if (value := getattr(self, name)) is not None:
                out[name] = {k: _rows_first(v, batch) for k, v in value.items()}
        if self.states is not None:
            memory, momentum = self.states
            out["memory"] = {k: _rows_first(v, batch) for k, v in memory.items()}
            out["momentum"] = {k: _rows_first(v.transpose(0, 1), batch) for k, v in momentum.items()}
        if self.configuration is not None:
            out["configuration"] = self.configuration
        return TensorDict(out, batch_size=[batch])

    @classmethod
    def from_tensordict(cls, td) -> "NeuralMemState":
        """Return the state of `td`, a TensorDict that `to_tensordict` made; it has no `updates`. ValueError unless all
        rows are at the same position and come from memories of one configuration.
        """
        if tuple(td.batch_size) != (td.numel(),) or td.numel() == 0:
            raise wrong(
                "td", Words(f"batch size {tuple(td.batch_size)}"), "one dim of rows, at least one (see flatten)"
            )
        index = td["seq_index"]
        if (index != index[0]).any():
            raise wrong("td", Words(f"rows at positions {index.tolist()}"), "rows that stand at one position")

        names = set(td.keys())

        def merged(key):
            return {k: v.flatten(0, 1) for k, v in td[key].items()} if key in names else None

        waiting = td.get("cache_store_segment", None)
        momentum = merged("momentum")
        states = None
        if (memory := merged("memory")) is not None:
            states = (memory, {k: v.transpose(0, 1) for k, v in (momentum or {}).items()})
        return cls(
            seq_index=int(index[0]),
            weights=merged("weights"),
            cache_store_segment=waiting if waiting is None or waiting.ndim == 3 else waiting.transpose(0, 1),
            states=states,
            read_weights=merged("read_weights"),
            configuration=_configuration(td["configuration"]) if "configuration" in names else None,
            **{name: td.get(name, None) for name in ROWS},
        )


def _configuration(rows: str | list) -> str:
    """Return the configuration that all rows share. rows: one text, or a list with one for each row of a stack."""
    if isinstance(rows, str):
        return rows
    first, *others = rows
    for other in others:
        check_identity(first, other, "td")
    return first


def _rows_first(x: Tensor, batch: int) -> Tensor:
    return x.unflatten(0, (batch, -1))


def mem_state_detach(state: NeuralMemState) -> NeuralMemState:
    """Return the state without its autograd graph, for truncated backpropagation through time. ValueError if `state` is
    not a NeuralMemState.
    """
    of_kind(state, NeuralMemState, "state", "a NeuralMemState")
    return NeuralMemState(*(_detach(value) for value in state))


def _detach(value):
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, LazyTensors):
        return value.map(Tensor.detach)
    if isinstance(value, Mapping):
        return {k: v.detach() for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_detach(v) for v in value)
    return value
