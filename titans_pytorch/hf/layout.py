"""Turns padded and packed batches into rows that the model can read: one text a row, padding only after its tokens.

Letters: b batch, n positions of a call, r rows, m tokens of the longest, d features
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_pytorch.common.checks import Words, wrong
from titans_pytorch.hf.cache import TitansCache


@dataclass(frozen=True)
class Layout:
    """Maps the tokens of a call [b n] to the rows [r m] that the model reads.

    shape: (b, n).
    index: long [r m], each row's positions in the flattened [b n]; None where the rows are the call's own.
    real: bool [r m], False for padding behind a row's tokens; None without padding.
    packed: whether one row of the call holds several.
    """

    shape: tuple[int, int]
    index: Tensor | None = None
    real: Tensor | None = None
    packed: bool = False

    @property
    def streams(self) -> bool:
        """Whether a cache can continue this call: b rows with equally many tokens."""
        return not self.packed and self.real is None

    @property
    def one_token(self) -> bool:
        """Whether each row of the call is one token."""
        return self.shape[1] == 1 and self.index is None and self.real is None

    @property
    def rows(self) -> tuple[int, int]:
        """(r, m)."""
        if self.index is None:
            return self.shape
        r, m = self.index.shape
        return r, m

    def take(self, x: Tensor, padding: float | None = None) -> Tensor:
        """x [b n ...] -> [r m ...]; `padding`: the value behind a row's tokens, None: any."""
        if self.index is not None:
            x = x.flatten(0, 1)[self.index]
        return x if padding is None or self.real is None else x.masked_fill(~_like(self.real, x), padding)

    def put(self, x: Tensor, padding: float = 0.0) -> Tensor:
        """x [r m ...] -> [b n ...], with the value `padding` at padding."""
        if self.index is None:
            return x if self.real is None else x.masked_fill(~_like(self.real, x), padding)
        b, n = self.shape
        index = self.index.flatten() if self.real is None else self.index[self.real]
        x = x.flatten(0, 1) if self.real is None else x[self.real]
        return x.new_full((b * n, *x.shape[1:]), padding).index_copy(0, index, x).unflatten(0, (b, n))


def _like(real: Tensor, x: Tensor) -> Tensor:
    """real [r m] with as many dims as x [r m ...]."""
    return real.view(*real.shape, *(1,) * (x.ndim - 2))


def lay_out(
    shape: tuple[int, int],
    cache: TitansCache | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    packing: dict,
) -> Layout:
    """Return the layout of a call.

    Args:
        shape: (b, n).
        cache: the cache of the call before.
        attention_mask: 1 for tokens, 0 for padding, [b, positions read + n]; None: no padding.
        position_ids: [b n] or [1 n]; they restart at 0 where a text begins.
        packing: those of cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, seq_idx that are given.

    Raises:
        ValueError: naming the argument.
    """
    real = _real(shape, cache, attention_mask)
    starts = _starts(shape, cache, real, position_ids, packing)
    layout = _layout(shape, real, starts)
    longest = layout.rows[1] if layout.packed or real is None else 1
    for name in ("max_length_q", "max_length_k"):
        if name in packing and int(packing[name]) < longest:
            raise wrong(name, packing[name], f"at least the tokens of the longest text, {longest}")
    return layout


def _layout(shape: tuple[int, int], real: Tensor | None, starts: Tensor | None) -> Layout:
    if starts is None:
        if real is None:
            return Layout(shape)
        counts = real.sum(dim=1)
        if (counts != counts[0]).any() and not (real[:, 1:] > real[:, :-1]).any():
            return Layout(shape, real=real)  # padding at the end
        starts = _first_of_rows(real)
    return _of_starts(shape, _all(shape, real, starts.device), starts)


def _of_starts(shape: tuple[int, int], real: Tensor, starts: Tensor) -> Layout:
    """The layout of rows that begin at `starts`; real, starts: bool [b n]."""
    where = real.flatten().nonzero().squeeze(1)
    row = starts.flatten()[where].cumsum(0) - 1
    lengths = row.bincount()
    column = torch.arange(len(where), device=where.device) - (lengths.cumsum(0) - lengths)[row]
    index = where.new_zeros(len(lengths), int(lengths.max()))
    filled = torch.zeros_like(index, dtype=torch.bool)
    index[row, column], filled[row, column] = where, True
    # a row without tokens counts as packed: no cache can continue it
    packed = len(lengths) != shape[0] or bool((starts.sum(dim=1) != 1).any())
    return Layout(shape, index, None if filled.all() else filled, packed)


def _first_of_rows(real: Tensor) -> Tensor:
    """The first token of each row, bool [b n]."""
    return real & (real.cumsum(dim=1) == 1)


def _real(shape: tuple[int, int], cache: TitansCache | None, mask: Tensor | None) -> Tensor | None:
    """Return where tokens are, bool [b n], or None without padding."""
    if mask is None:
        return None
    (b, n), (past, tokens) = shape, (0, 0) if cache is None else (cache.positions, cache.tokens)
    if not isinstance(mask, Tensor) or mask.shape != (b, past + n):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else Words(type(mask).__name__)
        raise wrong("attention_mask", got, f"[b, positions read + n] = {(b, past + n)}")
    seen = mask == 1
    if not torch.all(seen | (mask == 0)):
        raise wrong("attention_mask", Words("other values"), "1 for tokens and 0 for padding")
    if past and (seen[:, :past].sum(dim=1) != tokens).any():
        raise wrong("attention_mask", Words("others"), f"1 for each of the {tokens} tokens that the cache has read")
    seen = seen[:, past:]
    if not seen.any():
        raise wrong("attention_mask", Words("padding alone"), "1 for a token or more")
    return None if seen.all() else seen


def _starts(
    shape: tuple[int, int], cache: TitansCache | None, real: Tensor | None, position_ids: Tensor | None, packing: dict
) -> Tensor | None:
    """Return where texts begin, bool [b n], or None if every row is one text."""
    found: dict[str, Tensor | None] = {}
    if position_ids is not None:
        found["position_ids"] = _starts_of_positions(shape, cache, real, position_ids)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if name in packing:
            found[name] = _starts_of_lengths(shape, real, name, packing[name])
    if "seq_idx" in packing:
        found["seq_idx"] = _starts_of_seq_idx(shape, real, packing["seq_idx"])
    if not found:
        return None
    (first, starts), *others = found.items()
    for name, other in others:
        if (other is None) != (starts is None) or not (other is None or starts is None or other.equal(starts)):
            raise ValueError(f"{name} cannot be combined with {first} of other texts")
    if starts is not None and cache is not None and cache.is_initialized:
        raise ValueError(f"{first} of several texts in a row cannot be combined with a cache")
    return starts


def _several(real: Tensor, starts: Tensor) -> Tensor | None:
    """`starts`, or None where each row of the call is one text."""
    return None if starts.equal(_first_of_rows(real)) else starts


def _all(shape: tuple[int, int], real: Tensor | None, device: torch.device) -> Tensor:
    return torch.ones(shape, dtype=torch.bool, device=device) if real is None else real


def _starts_of_positions(
    shape: tuple[int, int], cache: TitansCache | None, real: Tensor | None, ids: Tensor
) -> Tensor | None:
    b, n = shape
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.shape not in ((b, n), (1, n)):
        got = tuple(ids.shape) if isinstance(ids, Tensor) and not ids.is_floating_point() else Words(type(ids).__name__)
        raise wrong("position_ids", got, f"integers of shape {(b, n)} or {(1, n)}")
    past, tokens = (0, 0) if cache is None else (cache.positions, cache.tokens)
    columns = torch.arange(n, device=ids.device)
    if real is None:
        if ((ids == tokens + columns) | (ids == past + columns)).all():
            return None
        real = torch.ones(shape, dtype=torch.bool, device=ids.device)
    ids = ids.expand(shape)
    if (ids == past + columns)[real].all() or (ids == tokens + real.cumsum(dim=1) - 1)[real].all():
        return None
    if past:
        raise wrong("position_ids", Words("others"), f"{past}, {past + 1}, ... behind the cache")
    of_tokens, row = ids[real], torch.arange(b, device=ids.device)[:, None].expand(shape)[real]
    begins = torch.ones_like(of_tokens, dtype=torch.bool)
    begins[1:] = (of_tokens[1:] != of_tokens[:-1] + 1) | (row[1:] != row[:-1])
    if (of_tokens[begins] != 0).any():
        raise wrong("position_ids", Words("others"), "0, 1, 2, ..., again from 0 where a text begins")
    return _several(real, torch.zeros_like(real).masked_scatter(real, begins))


def _starts_of_lengths(shape: tuple[int, int], real: Tensor | None, name: str, bounds: Tensor) -> Tensor | None:
    b, n = shape
    if real is not None:
        raise ValueError(f"{name} cannot be combined with padding in attention_mask")
    whole = isinstance(bounds, Tensor) and bounds.ndim == 1 and not bounds.is_floating_point() and len(bounds) > 1
    if not whole or bounds[0] != 0 or bounds[-1] != b * n or (bounds[1:] <= bounds[:-1]).any():
        got = bounds.tolist() if isinstance(bounds, Tensor) else Words(type(bounds).__name__)
        raise wrong(name, got, f"growing integers from 0 to b * n = {b * n}")
    starts = torch.zeros(b * n, dtype=torch.bool, device=bounds.device)
    starts[bounds[:-1].long()] = True
    starts = starts.view(shape)
    if not starts[:, 0].all():
        raise wrong(name, Words("a text over two rows"), "a bound at each row's begin")
    return _several(torch.ones_like(starts), starts)


def _starts_of_seq_idx(shape: tuple[int, int], real: Tensor | None, idx: Tensor) -> Tensor | None:
    if not isinstance(idx, Tensor) or idx.is_floating_point() or idx.shape != shape:
        got = tuple(idx.shape) if isinstance(idx, Tensor) else Words(type(idx).__name__)
        raise wrong("seq_idx", got, f"integers of shape {shape}")
    real = torch.ones_like(idx, dtype=torch.bool) if real is None else real
    of_tokens, row = idx[real], torch.arange(shape[0], device=idx.device)[:, None].expand(shape)[real]
    begins = torch.ones_like(of_tokens, dtype=torch.bool)
    begins[1:] = (of_tokens[1:] != of_tokens[:-1]) | (row[1:] != row[:-1])
    return _several(real, torch.zeros_like(real).masked_scatter(real, begins))
