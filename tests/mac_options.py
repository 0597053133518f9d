"""Small transformers with any set of options, in float64, for the tests."""

from contextlib import contextmanager

import torch
from hypothesis import strategies as st

from titans_pytorch.mac_transformer import MemoryAsContextTransformer

TOKENS = 11

# of the memory; pages are turned often enough to matter
GATES = {
    "none": {},
    "decay": {"use_symplectic_gating": True, "kinetics_coupling": True, "kinetics_mix": 0.5},
    "pages": {"use_symplectic_gating": True, "num_pages": 3, "symplectic_page_threshold": 0.1},
    "keyed": {
        "use_symplectic_gating": True,
        "use_dmd_gating": True,
        "combine_symplectic_and_dmd": True,
        "symplectic_gate_kwargs": {"phase_mix": 0.5, "quorum_mix": 0.5, "budget_topk_ratio": 0.7},
        "num_pages": 2,
        "manifold_state_keyed_paging": True,
        "symplectic_page_threshold": 0.05,
    },
    "hierarchical": {
        "use_symplectic_gating": True,
        "symplectic_gate_kwargs": {"gated": True, "gate_mode": "soft", "codebook_mix": 0.5, "dim_free": True},
        "num_pages": 4,
        "hierarchical_paging": True,
        "hierarchy_mix": 0.6,
        "page_threshold_quantile": 0.3,
    },
}

OPTIONS = st.fixed_dictionaries(
    {
        "depth": st.integers(1, 4),
        "segment_len": st.integers(1, 6),
        "num_longterm_mem_tokens": st.integers(0, 2),
        "num_persist_mem_tokens": st.integers(0, 2),
        "sliding_window_attn": st.booleans(),
        "num_residual_streams": st.sampled_from([1, 4]),
        "neural_mem_gate_attn_output": st.booleans(),
        "neural_mem_weight_residual": st.booleans(),
        "neural_memory_qkv_receives_diff_views": st.booleans(),
        "neural_memory_segment_len": st.sampled_from([None, 1, 2, 3, 5]),
        "batches": st.sampled_from([None, 1, 2, 3]),
        "memory_layers": st.sets(st.integers(1, 4)),
        "gates": st.sampled_from(list(GATES)),
        "neural_memory_kwargs": st.fixed_dictionaries(
            {
                "momentum": st.booleans(),
                "qk_rmsnorm": st.just(True),  # keeps random weights finite
                "attn_pool_chunks": st.booleans(),
                "per_parameter_lr_modulation": st.booleans(),
                "spectral_norm_surprises": st.booleans(),
                "default_step_transform_max_lr": st.just(0.1),
                "default_model_kwargs": st.sampled_from([{"depth": 1}, {"depth": 2, "expansion_factor": 2.0}]),
            }
        ),
    }
)


@contextmanager
def float64():
    """Modules are made in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(options: dict, seed: int = 0, **more) -> MemoryAsContextTransformer:
    """A model with random parameters, so that a gate at zero or a norm at one hides nothing.

    Orthogonalised updates, taken at weights that move every few tokens, make a rounding error grow tenfold in as many
    tokens (so does a change of the weights by one part in 1e16): the random options leave that pair out."""
    options = dict(options)
    batches, layers = options.pop("batches", None), options.pop("memory_layers", None)
    if gates := GATES[options.pop("gates", "none")]:
        options["neural_memory_kwargs"] = {**options.get("neural_memory_kwargs", {}), **gates}
    if batches and options["neural_memory_kwargs"].get("spectral_norm_surprises"):
        batches = None
    if layers is not None:
        options["neural_memory_layers"] = tuple(sorted(layer for layer in layers if layer <= options["depth"]))
    if batches is not None:
        chunk = options.get("neural_memory_segment_len")
        chunk = options["segment_len"] + options.get("num_longterm_mem_tokens", 0) if chunk is None else chunk
        options["neural_memory_batch_size"] = chunk * batches
    torch.manual_seed(seed)
    with float64():
        model = MemoryAsContextTransformer(
            **{"num_tokens": TOKENS, "dim": 12, "heads": 2, "dim_head": 6, "ff_mult": 2, **options, **more}
        )
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.1)
    return model


def draw_ids(batch: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, TOKENS, (batch, n), generator=torch.Generator().manual_seed(seed))
