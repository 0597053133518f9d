"""NeuralMemory's keywords, checked and turned into the few objects that the rest of the code sees."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from titans_pytorch.common.checks import Words, positive_int, wrong
from titans_pytorch.engines.chunkwise import FastEngine
from titans_pytorch.engines.sequential import ReferenceEngine
from titans_pytorch.engines.update_rule import UpdateRule
from titans_pytorch.memory_models import MemoryMLP, ResidualNorm, fast_form

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


def default_model(dim: int, kwargs: Mapping) -> MemoryMLP:
    allowed = ("depth", "expansion_factor")
    if not isinstance(kwargs, Mapping) or "depth" not in kwargs or not set(kwargs) <= set(allowed):
        raise wrong("default_model_kwargs", kwargs, "keywords of MemoryMLP: depth, and expansion_factor if you like")
    return MemoryMLP(dim, **kwargs)


def memory_template(model: nn.Module, dim: int) -> nn.Module:
    """A copy of the memory model, on the meta device: it says how weights are used, the weights come from elsewhere."""
    if not isinstance(model, nn.Module):
        raise wrong("model", model, "a torch.nn.Module mapping [.. n d] to [.. n d]")
    kind = type(model).__name__
    if buffers := [name for name, _ in model.named_buffers()]:
        raise wrong("model", Words(f"{kind} with buffers {', '.join(buffers)}"), "a module without buffers")
    if not any(True for _ in model.parameters()):
        raise wrong("model", Words(f"{kind} without parameters"), "a module with parameters")
    param = next(model.parameters())
    for shape in ((2, 3, dim), (3, dim)):
        try:
            with torch.no_grad():
                out = model(torch.zeros(shape, dtype=param.dtype, device=param.device))
        except Exception as error:
            got = Words(f"{kind}, which fails on {shape} with {type(error).__name__}: {error}")
            raise wrong("model", got, f"a module that maps [.. n {dim}] to [.. n {dim}]") from error
        if not isinstance(out, Tensor) or tuple(out.shape) != shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise wrong("model", Words(f"{kind}, which maps {shape} to {got}"), "a module that keeps the shape")
    # parameters are put in place one by one: those that are tied stay tied
    on_meta = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in model.parameters()}
    return copy.deepcopy(model, on_meta)


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
        raise ValueError(f'engine="{engine}" needs a memory model with a method with_weights(x, weights)')
    if engine == "dual" and rule.spectral_norm:
        raise ValueError('engine="dual" cannot be combined with spectral_norm_surprises, which acts on built weights')
    return FastEngine(model, rule, form == "taped", engine)
