"""The correctness gate: an arm with a wrong output is not timed.

The peer writes its weights, an input, its output and a gradient; ours loads the weights and compares. Ours is also
compared with its own sequential engine in float64, with or without a peer. Parameters are moved off their initial
values, so that gates and norms that start at zero or one hide no error. Errors are the largest difference over the
largest expected value; the gradient is that of the input, or of the embedding.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .arms import Setup, build_module, inputs

SPREAD = 0.02


def randomise(module: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64) * SPREAD
            p.data = p.data.clone(memory_format=torch.contiguous_format) + noise.to(p)
    return module


def answer(module: nn.Module, case: Mapping[str, Any], x: Tensor) -> dict[str, Tensor]:
    """Return the output of x, and the gradient of a fixed projection of it."""
    if case["kind"] == "transformer":
        out, leaf = module(x), module.token_emb.weight
    else:
        leaf = x = x.clone().requires_grad_()
        out = module(x)[0]
    generator = torch.Generator().manual_seed(2)
    probe = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    (grad,) = torch.autograd.grad((out * probe).sum(), [leaf])
    return {"output": out.detach(), "gradient": grad}


def write_answer(case: Mapping[str, Any], setup: Setup, batch: int, tokens: int, path: str) -> None:
    """Write output and gradient (the peer's side)."""
    setup = replace(setup, dtype="float32")
    module = randomise(build_module(case, setup), setup.seed)
    x = inputs(case, setup, batch, tokens)
    torch.save({"weights": module.state_dict(), "input": x, "answer": answer(module, case, x)}, path)


def compare_with_peer(case: Mapping[str, Any], setup: Setup, path: str) -> dict[str, float]:
    """Return the errors against the peer's output (our side)."""
    from titans_pytorch import load_peer_state_dict

    saved = torch.load(path, weights_only=True, map_location=setup.device)
    module = build_module(case, replace(setup, dtype="float32"))
    load_peer_state_dict(module, saved["weights"])
    return errors(answer(module, case, saved["input"]), saved["answer"])


def compare_with_reference(case: Mapping[str, Any], setup: Setup, batch: int, tokens: int) -> dict[str, float]:
    """Return the errors of our engine against the sequential engine, in float64."""
    setup = replace(setup, dtype="float64")
    x = inputs(case, setup, batch, tokens)
    module = randomise(build_module(case, setup), setup.seed)
    reference = build_module(case, replace(setup, engine="reference"))
    reference.load_state_dict(module.state_dict())
    return errors(answer(module, case, x), answer(reference, case, x))


def errors(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: relative_error(got[name], wanted[name]) for name in wanted}


def relative_error(got: Tensor, wanted: Tensor) -> float:
    if got.shape != wanted.shape:
        return float("inf")
    return ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()
