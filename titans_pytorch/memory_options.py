"""NeuralMemory's keywords, checked and turned into the few objects that the rest of the code sees."""

import copy

import torch
from torch import Tensor, nn

from .checks import positive_int, wrong
from .engines.fast import FastEngine
from .engines.reference import ReferenceEngine
from .engines.update_rule import UpdateRule
from .memory_models import ResidualNorm, fast_form

ENGINES = ("auto", "dual", "matrix", "reference")


def chunk_sizes(chunk_size) -> tuple[int, int]:
    """(retrieve, store) from an int or a pair."""
    pair = chunk_size if isinstance(chunk_size, (tuple, list)) else (chunk_size, chunk_size)
    if len(pair) != 2:
        raise wrong("chunk_size", chunk_size, "a positive integer or a (retrieve, store) pair of them")
    return positive_int(pair[0], "chunk_size"), positive_int(pair[1], "chunk_size")


def batch_chunks(batch_size: int | None, store_chunk: int, name: str = "batch_size") -> int | None:
    """How many store chunks share an anchor; None for all."""
    if batch_size is None:
        return None
    if positive_int(batch_size, name) % store_chunk:
        raise wrong(name, batch_size, f"a multiple of the store chunk size, {store_chunk}")
    return batch_size // store_chunk


def memory_template(model: nn.Module, dim: int) -> nn.Module:
    """A copy of the memory model, on the meta device: it says how weights are used, the weights come from elsewhere."""
    if not isinstance(model, nn.Module):
        raise wrong("model", model, "a torch.nn.Module mapping [.. n d] to [.. n d]")
    if buffers := [name for name, _ in model.named_buffers()]:
        raise wrong("model", f"{type(model).__name__} with buffers {buffers}", "a module without buffers")
    if not any(True for _ in model.parameters()):
        raise wrong("model", f"{type(model).__name__} without parameters", "a module with parameters")
    param = next(model.parameters())
    probe = torch.zeros(2, 3, dim, dtype=param.dtype, device=param.device)
    try:
        with torch.no_grad():
            shape = tuple(model(probe).shape)
    except RuntimeError as error:
        raise wrong(
            "model", f"{type(model).__name__} ({error})", f"a module that maps [.. n {dim}] to itself"
        ) from None
    if shape != (2, 3, dim):
        raise wrong("model", f"one that maps (2, 3, {dim}) to {shape}", "a module that keeps the shape")
    return copy.deepcopy(model).to("meta")


def initial_weights(model: nn.Module, heads: int, per_head: bool) -> nn.ParameterList:
    """The learned initial weights: [h ...], each head its own copy, or [...] shared by the heads."""

    def start(p: Tensor) -> nn.Parameter:
        p = p.detach().clone()
        return nn.Parameter(p.expand(heads, *p.shape).clone() if per_head else p)

    return nn.ParameterList([start(p) for p in model.parameters()])


def wrap(model: nn.Module, dim: int, norm_residual: bool) -> nn.Module:
    return ResidualNorm(dim, model).to(next(model.parameters()).device) if norm_residual else model


def choose_engine(engine: str, model: nn.Module, rule: UpdateRule, use_accelerated_scan: bool):
    if engine not in ENGINES:
        raise wrong("engine", engine, f"one of {', '.join(ENGINES)}")
    form = fast_form(model)
    if engine == "reference" or (engine == "auto" and form is None):
        return ReferenceEngine(model, rule, use_accelerated_scan)
    if form is None:
        raise wrong("engine", engine, '"auto" or "reference" with a memory model that has no with_weights(x, weights)')
    if engine == "dual" and rule.spectral_norm:
        raise wrong(
            "engine", engine, '"auto", "matrix" or "reference" with spectral_norm_surprises: it acts on built weights'
        )
    return FastEngine(model, rule, form == "taped", engine)
