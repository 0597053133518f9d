"""The state of a model between calls. Its size does not depend on the tokens read, except in the plain transformer.

Letters: b batch, r rows chosen
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from titans_pytorch.memory.state import NeuralMemState, mem_state_detach


class ModelState(NamedTuple):
    """The state of a stream after `tokens` tokens. Calls never modify it. torch.save writes it and torch.load reads it;
    `detach` it first if it belongs to a graph.

    layers: the state of each block.
    configuration: JSON, the settings of the model that made it; a model of other settings refuses it.
    """

    tokens: int
    layers: tuple
    configuration: str | None = None

    @property
    def batch(self) -> int:
        """Number of rows."""
        return _batch(self.layers) or 0

    def rows(self, index: Tensor) -> "ModelState":
        """Return the rows at `index`, long [r], in this order: for beam search."""
        return self._replace(
            layers=_map(
                self.layers,
                lambda tensor: tensor.index_select(0, index),
                lambda memory: NeuralMemState.from_tensordict(memory.to_tensordict()[index]),
            )
        )

    def detach(self) -> "ModelState":
        """Return the state without its graph: for truncated backpropagation through time."""
        return self._replace(layers=_map(self.layers, Tensor.detach, mem_state_detach))


def _map(value: Any, of_tensor: Callable, of_memory: Callable) -> Any:
    """Replace the tensors [b ...] and the memories of a state."""
    if isinstance(value, NeuralMemState):
        return of_memory(value)
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, Mapping):
        return {name: of_tensor(tensor) for name, tensor in value.items()}
    if isinstance(value, tuple):
        parts = [_map(part, of_tensor, of_memory) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _batch(value: Any) -> int | None:
    """Return the first dim of any tensor [b ...] in it."""
    if isinstance(value, NeuralMemState):
        value = value.cache_store_segment
    if isinstance(value, Tensor):
        return value.shape[0]
    parts = map(_batch, value) if isinstance(value, tuple) else ()
    return next((part for part in parts if part is not None), None)
