"""Memories, family models and transformers with random settings, good and bad ones, and what they read."""

import random

import torch
from torch import nn

from titans_pytorch import (
    FactorizedMemoryMLP,
    GatedResidualMemoryMLP,
    MemoryAsContextTransformer,
    MemoryMLP,
    MemorySwiGluMLP,
    NeuralMemory,
    TitansConfig,
    build_model,
)

DIM, TOKENS = 32, 32
STREAMS = ("noise", "smooth", "constant", "text")
NETWORKS = {
    "linear": lambda d: MemoryMLP(d, 1),
    "two layers": lambda d: MemoryMLP(d, 2),
    "four layers": lambda d: MemoryMLP(d, 4),
    "factorized": lambda d: FactorizedMemoryMLP(d, 2, k=8),
    "swiglu": lambda d: MemorySwiGluMLP(d),
    "gated residual": lambda d: GatedResidualMemoryMLP(d, 2, 2.0),
}


def huber(prediction, target):
    return nn.functional.huber_loss(prediction, target, reduction="none").mean(dim=-1)


def fourth_power(prediction, target):
    return (prediction - target).pow(4).mean(dim=-1)


def stream(kind: str, tokens: int, seed: int, dim: int = DIM) -> torch.Tensor:
    """[1 n d]: noise, slow waves, nearly one token, or text (a sentence said again and again, a vector a letter)."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, tokens, dim, generator=rng)
    if kind == "noise":
        return noise
    if kind == "smooth":
        t = torch.arange(tokens) / 40
        return torch.stack([torch.sin(t * (k + 1) / 8 + k) for k in range(dim)], dim=-1)[None] + 0.1 * noise
    if kind == "constant":
        return torch.randn(1, 1, dim, generator=rng) + 0.01 * noise
    return torch.randn(TOKENS, dim, generator=rng)[letters(tokens)][None]


def letters(tokens: int) -> torch.Tensor:
    sentence = b"the quick brown fox jumps over the lazy dog, and then again, "
    return torch.tensor([letter % TOKENS for letter in sentence]).repeat(tokens // len(sentence) + 1)[:tokens]


def ids(kind: str, tokens: int, seed: int) -> torch.Tensor:
    """[1 n]: the same as token ids."""
    rng = torch.Generator().manual_seed(seed)
    if kind == "noise":
        return torch.randint(TOKENS, (1, tokens), generator=rng)
    if kind == "smooth":
        return ((torch.arange(tokens) / 16).sin() * (TOKENS // 2 - 1) + TOKENS // 2).long()[None]
    return torch.full((1, tokens), seed % TOKENS) if kind == "constant" else letters(tokens)[None]


def memory_options(draw: random.Random, chunk: int) -> dict:
    """Keywords that every user of a NeuralMemory can set."""
    flag = lambda share: draw.random() < share  # noqa: E731
    options = {
        "mem_model_norm_add_residual": flag(0.6),
        "default_step_transform_max_lr": draw.choice([1.0, 1.0, 1.0, 0.3, 0.1, 0.01]),
        "momentum": flag(0.7),
        "momentum_order": draw.choice([1, 1, 2]),
        "learned_momentum_combine": flag(0.2),
        "qk_rmsnorm": flag(0.4),
        "max_grad_norm": draw.choice([None, None, 1.0, 0.1]),
        "spectral_norm_surprises": flag(0.2),
        "gated_transition": flag(0.15),
        "init_decay_bias": draw.choice([None, None, -6.0]),
        "init_momentum_bias": draw.choice([None, None, None, 3.0]),
        "per_parameter_lr_modulation": flag(0.3),
        "attn_pool_chunks": flag(0.3),
        "pre_rmsnorm": flag(0.9),
        "surprise_threshold": draw.choice([None, None, 0.1]),
        "store_memory_loss_fn": draw.choice([None, None, None, huber, fourth_power]),
        "kinetics_coupling": flag(0.15),
        "kinetics_mix": 0.5,
    }
    if flag(0.3):
        options |= {"use_symplectic_gating": True, "num_pages": draw.choice([1, 2]), "symplectic_page_threshold": 0.1}
        options["page_switch_every"] = draw.choice([None, 4 * chunk])
    if flag(0.1):
        options |= {"use_dmd_gating": True, "combine_symplectic_and_dmd": "use_symplectic_gating" in options}
    return options


def random_memory(draw: random.Random) -> tuple[NeuralMemory, dict]:
    chunk, heads = draw.choice([1, 4, 8, 16]), draw.choice([1, 1, 2])
    network = draw.choice(list(NETWORKS))
    options = memory_options(draw, chunk) | {
        "chunk_size": chunk,
        "batch_size": draw.choice([None, chunk, 4 * chunk, 16 * chunk]),
        "heads": heads,
        "dim_head": DIM // heads,
        "num_kv_per_token": draw.choice([1, 1, 2]),
        "activation": draw.choice([None, None, nn.SiLU()]),
        "qkv_conv_kernel": draw.choice([None, None, 4]),
    }
    if not options["qk_rmsnorm"]:
        options["qk_l2norm"] = draw.random() < 0.3
    return NeuralMemory(DIM, model=NETWORKS[network](DIM // heads), **options), options | {"network": network}


def random_family(draw: random.Random) -> tuple[nn.Module, dict]:
    settings = {
        "variant": draw.choice(["mac", "mag", "mal", "lmm"]),
        "d_model": DIM,
        "vocab_size": TOKENS,
        "n_layers": draw.choice([1, 2]),
        "n_heads": 2,
        "mem_heads": draw.choice([1, 2]),
        "window": 32,
        "chunk_size": draw.choice([4, 16, 32]),
        "mem_layers": draw.choice([1, 2, 3]),
        "use_momentum": draw.random() < 0.7,
        "use_decay": draw.random() < 0.7,
        "max_step": draw.choice([0.1, 0.1, 0.5, 1.0, 4.0]),
        "conv_kernel": draw.choice([0, 4]),
        "qk_norm": draw.choice(["l2", "rms", "none"]),
        "mem_norm": draw.random() < 0.5,
        "init_decay_bias": draw.choice([-6.0, None]),
        "surprise_threshold": draw.choice([None, None, 0.1]),
    }
    return build_model(TitansConfig.tiny(**settings), torch.device("cpu")), settings


def random_transformer(draw: random.Random) -> tuple[nn.Module, dict]:
    chunk = draw.choice([4, 16, None])
    settings = {
        "num_tokens": TOKENS,
        "dim": DIM,
        "depth": draw.choice([1, 2]),
        "heads": 2,
        "dim_head": 16,
        "segment_len": 32,
        "num_persist_mem_tokens": draw.choice([0, 4]),
        "num_residual_streams": 1,
        "neural_memory_segment_len": chunk,
        "neural_memory_batch_size": draw.choice([None, 4 * (chunk or 32), 16 * (chunk or 32)]),
        "neural_mem_weight_residual": draw.random() < 0.3,
        "neural_memory_qkv_receives_diff_views": draw.random() < 0.3,
        "neural_mem_gate_attn_output": draw.random() < 0.3,
        "neural_memory_kwargs": memory_options(draw, chunk or 32),
    }
    return MemoryAsContextTransformer(**settings), settings


def random_model(seed: int) -> tuple[str, nn.Module, dict]:
    """Its kind, itself, and its settings."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    kind, build = draw.choices(
        [("layer", random_memory), ("family", random_family), ("transformer", random_transformer)], [6, 2.5, 1.5]
    )[0]
    model, settings = build(draw)
    return kind, model.eval(), settings


@torch.no_grad()
def read(model: nn.Module, kind: str, tokens: int, seed: int, piece: int = 512) -> bool:
    """Reads a stream in pieces, the state carried; whether every output is finite."""
    layer, state, finite = isinstance(model, NeuralMemory), None, True
    dim = model.dim if layer else 0
    seq = stream(kind, tokens, seed, dim) if layer else ids(kind, tokens, seed)
    for part in seq.split(piece, dim=1):
        out, state = model(part, state=state) if layer else model(part, cache=state, return_cache=True)
        finite = finite and bool(out.isfinite().all())
    return finite
