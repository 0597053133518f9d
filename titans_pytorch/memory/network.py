"""The memory network: a template for applying weights, and the learned initial fast weights."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from titans_pytorch.common.checks import Words, positive_int, wrong
from titans_pytorch.memory_models import MemoryMLP, ResidualNorm
from titans_pytorch.ops.modes import at_least_float32


def default_model(dim: int, kwargs: Mapping) -> MemoryMLP:
    """Return MemoryMLP(dim, **kwargs); ValueError for other keywords."""
    allowed = ("depth", "expansion_factor")
    if not isinstance(kwargs, Mapping) or "depth" not in kwargs or not set(kwargs) <= set(allowed):
        raise wrong("default_model_kwargs", kwargs, "keywords of MemoryMLP: depth, and expansion_factor if you like")
    return MemoryMLP(dim, **kwargs)


def template_of(model: nn.Module, dim: int) -> nn.Module:
    """Return a copy of the memory network on the meta device. ValueError for a module that cannot be one."""
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
            failed = Words(f"{kind}, which fails on {shape} with {type(error).__name__}: {error}")
            raise wrong("model", failed, f"a module that maps [.. n {dim}] to [.. n {dim}]") from error
        if not isinstance(out, Tensor) or tuple(out.shape) != shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise wrong("model", Words(f"{kind}, which maps {shape} to {got}"), "a module that keeps the shape")
    # parameters are replaced one by one, so that tied ones stay tied
    on_meta = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in model.parameters()}
    return copy.deepcopy(model, on_meta)


def wrapped(model: nn.Module, dim: int, norm_residual: bool) -> nn.Module:
    """Return the network, with `norm_residual` as LayerNorm(model(x)) (gamma + 1) + x."""
    return ResidualNorm(dim, model).to(next(model.parameters()).device) if norm_residual else model


class InitialWeights(nn.ParameterList):
    """The learned initial fast weights, one parameter for each one of the network: [h ...], or [...] shared by heads.

    Args:
        model: the network.
        heads: heads of all pages.
        per_head: whether every head has its own initial weights.
    """

    def __init__(self, model: nn.Module, heads: int, per_head: bool):
        def start(p: Tensor) -> nn.Parameter:
            p = p.detach().clone()
            return nn.Parameter(p.expand(heads, *p.shape).clone() if per_head else p)

        super().__init__([start(p) for p in model.parameters()])
        self.names = tuple(name for name, _ in model.named_parameters())
        self.heads, self.per_head = heads, per_head

    def for_batch(self, batch: int) -> dict[str, Tensor]:
        """Return the fast weights of `batch` rows, name -> [(batch h) ...], at least float32."""
        positive_int(batch, "batch")
        out = {}
        for name, p in zip(self.names, self, strict=True):
            p = at_least_float32(p.clone())  # a copy: tensors that are built later must not see an optimizer's step
            p = p if self.per_head else p.expand(self.heads, *p.shape)
            out[name] = p.expand(batch, *p.shape).flatten(0, 1)
        return out

    def shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of `for_batch(batch)`, name -> ((batch h), ...)."""
        rows, own = batch * self.heads, int(self.per_head)
        return {name: (rows, *p.shape[own:]) for name, p in zip(self.names, self, strict=True)}
