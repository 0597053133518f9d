"""The cache of `generate`: a ModelState, whose size does not depend on the tokens read (except in "baseline").

Letters: b batch, r rows chosen
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from titans_pytorch.models.state import ModelState


class TitansCache:
    """A ModelState behind the interface that `generate` expects of a cache.

    A call of the model leaves the cache it is given unchanged and returns the next one in its output.

    Args:
        state: the model's state; None before the first token.
        positions: positions read, padding included; None: the tokens of the state.
    """

    is_compileable = False
    is_linear = (False,)  # of each layer: False makes `generate` pass only the tokens that the cache has not read
    is_sliding = (False,)
    is_croppable = False

    def __init__(self, state: ModelState | None = None, positions: int | None = None):
        self.state = state
        self.positions = positions if positions is not None else self.tokens

    @property
    def tokens(self) -> int:
        """Tokens read, without padding."""
        return 0 if self.state is None else self.state.tokens

    @property
    def is_initialized(self) -> bool:
        """Whether any token was read."""
        return self.state is not None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions read, padding included; the same in every layer, whatever `layer_idx`."""
        return self.positions

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: no maximum, in any layer, whatever `layer_idx`."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Selects the rows `beam_idx` [r], in this order."""
        if self.state is not None:
            device = next(_tensors(self.state.layers)).device
            self.state = self.state.rows(beam_idx.to(device))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Selects the rows `indices` [r]."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times, one after the other."""
        if self.state is not None:
            self.reorder_cache(torch.arange(self.state.batch).repeat_interleave(repeats))

    def reset(self) -> None:
        """Drop the state."""
        self.state, self.positions = None, 0

    def crop(self, max_length: int) -> None:
        """Not possible, whatever `max_length`: a memory cannot undo single tokens."""
        raise ValueError(f"crop({max_length}) cannot be combined with a TitansCache: it cannot forget single tokens")

    def activate_past_recording(self) -> None:
        """Not possible: a memory cannot undo single tokens."""
        raise ValueError("assisted decoding cannot be combined with a TitansCache: it cannot forget single tokens")

    def __reduce__(self):  # a form that torch.load reads with weights_only = True
        return type(self), (self.state, self.positions)

    def __deepcopy__(self, memo: dict) -> "TitansCache":
        copied = TitansCache(self.state, self.positions)
        if self.state is not None:  # torch cannot deep-copy tensors of a graph
            copied.reorder_cache(torch.arange(self.state.batch))
        return copied


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
