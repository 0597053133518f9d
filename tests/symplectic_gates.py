"""SymplecticGating with random options and parameters, and everything that it returns, for the tests."""

import torch
from hypothesis import strategies as st

from titans_pytorch.gates.symplectic import SymplecticGating

MAPS = {
    "moment_map": "return_moment_map",
    "phase_map": "return_phase_map",
    "codebook_map": "return_codebook_map",
    "quorum_map": "return_quorum_map",
    "sparse_k": "return_sparse_k",
    "manifold": "return_manifold_state",
}
EVERYTHING = {
    "gated": True,
    "gate_mode": "soft",
    "adaptive_topk_ratio": 0.8,
    "phase_mix": 0.3,
    "codebook_mix": 0.3,
    "codebook_size": 5,
    "codebook_topk": 3,
    "quorum_mix": 0.6,
    "budget_topk_ratio": 0.5,
    "budget_window": 4,
}


@st.composite
def options(draw, budget=("none", "sequence", "window")):
    """Constructor arguments with every option on or off, dim included."""
    dim = draw(st.integers(2, 7))
    kwargs = {"dim": dim, "dim_free": draw(st.booleans())}
    if draw(st.booleans()):
        kwargs.update(gated=True, diag=draw(st.booleans()), gate_mode=draw(st.sampled_from(["hard", "soft"])))
        kwargs.update(gate_threshold=draw(st.sampled_from([0.0, -0.2, 0.1])))
        sparse = draw(st.sampled_from(["none", "fixed", "adaptive"]))
        if sparse == "fixed":
            kwargs.update(top_k=draw(st.integers(1, dim)))
        if sparse == "adaptive":
            kwargs.update(adaptive_topk_ratio=draw(st.floats(0.05, 1.0)), adaptive_topk_min_k=draw(st.integers(1, dim)))
    if draw(st.booleans()):
        kwargs.update(phase_mix=draw(st.floats(0.1, 1.0)), phase_pairs=draw(st.none() | st.integers(1, 4)))
    if draw(st.booleans()):
        size = draw(st.integers(1, 6))
        kwargs.update(codebook_mix=draw(st.floats(0.1, 1.0)), codebook_size=size)
        kwargs.update(codebook_topk=draw(st.none() | st.integers(1, size)))
    if draw(st.booleans()):
        kwargs.update(quorum_mix=draw(st.floats(0.1, 1.0)), quorum_window=draw(st.integers(1, 6)))
        kwargs.update(quorum_threshold=draw(st.floats(0.0, 1.0)), quorum_temperature=draw(st.floats(0.05, 1.0)))
        kind = draw(st.sampled_from(budget))
        if kind != "none":
            kwargs.update(budget_topk_ratio=draw(st.floats(0.05, 1.0)))
        if kind == "window":
            kwargs.update(budget_window=draw(st.integers(1, 6)))
    return kwargs


def build(kwargs, seed=0):
    """A gate in float64 with random parameters."""
    torch.manual_seed(seed)
    gate = SymplecticGating(**kwargs).double()
    with torch.no_grad():
        for p in gate.parameters():
            p.copy_(torch.randn_like(p) * 0.7)
    return gate


def tokens(b, n, dim, seed=0, dtype=torch.float64):
    return torch.randn(b, n, dim, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def everything(gate, x):
    names = [name for name in MAPS if name not in ("manifold",)]
    complexity, *maps, manifold = gate(x, **dict.fromkeys(MAPS.values(), True))
    out = dict(zip(["complexity", *names], [complexity, *maps], strict=True)) | (manifold or {})
    return {name: value for name, value in out.items() if value is not None}


def gradients(loss, leaves):
    grads = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)]
