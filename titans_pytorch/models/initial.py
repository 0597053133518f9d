"""Initial weights of a language model, by name. Fast weights: `mem_init` of `titans_memory`."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from titans_pytorch.common.checks import one_of, positive_number
from titans_pytorch.memory.rates import Rates

__all__ = ["INITS", "MEMORY_INITS", "fill", "initialise"]

MEMORY_INITS = ("xavier", "normal", "orthogonal")
INITS = ("default", *MEMORY_INITS)


def fill(weight: Tensor, name: str, std: float = 0.02) -> Tensor:
    """Fill a matrix in place and return it: "xavier" (uniform up to sqrt(6 / (in + out)) in size), "normal" (mean 0,
    standard deviation `std`) or "orthogonal" (its rows or its columns, whichever are fewer, are orthonormal).
    """
    fills: dict[str, Callable[[Tensor], Tensor]] = {
        "xavier": nn.init.xavier_uniform_,
        "normal": partial(nn.init.normal_, std=positive_number(std, "init_std")),
        "orthogonal": nn.init.orthogonal_,
    }
    with torch.no_grad():
        return fills[one_of(name, MEMORY_INITS, "init")](weight)


def initialise(model: nn.Module, init: str, std: float) -> None:
    """Give every linear map of a model new weights by the name `init`, and biases of 0; "default": leave PyTorch's.

    What has an initial value of its own keeps it: the maps that give a memory's rates, the bias of a convex gate, and
    the output map where it is the embedding. Convolutions, norms and persistent tokens are not linear maps.
    """
    if one_of(init, INITS, "init") == "default":
        return
    kept = {id(part) for rates in model.modules() if isinstance(rates, Rates) for part in rates.modules()}
    kept_biases = {id(gate.to_share) for gate in model.modules() if hasattr(gate, "to_share")}
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    for part in model.modules():
        if isinstance(part, nn.Linear) and id(part) not in kept and id(part.weight) not in embeddings:
            fill(part.weight, init, std)
            if part.bias is not None and id(part) not in kept_biases:
                nn.init.zeros_(part.bias)
