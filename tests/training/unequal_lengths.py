"""Trains DistributedDataParallel models on rows of another length in each process: `unequal_lengths.py OUT`."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from titans_pytorch import MemoryAsContextTransformer, NeuralMemory
from titans_pytorch.models.config import ModelConfig
from titans_pytorch.models.family import build_model

STEPS = [(3, 9), (9, 2), (2, 2), (5, 1)]  # tokens on each of two ranks


def models():
    """Name -> (model, what a row of n tokens is)."""

    def ids(n):
        return torch.arange(2 * n).view(2, n) % 11

    def features(n):
        return torch.linspace(-1.0, 1.0, 2 * n * 4).view(2, n, 4)

    sizes = {
        "vocab_size": 11,
        "d_model": 8,
        "n_layers": 1,
        "n_heads": 2,
        "mem_heads": 2,
        "n_persistent": 1,
        "window": 4,
    }
    gates = {"use_symplectic_gating": True, "num_pages": 2, "surprise_source": "prediction"}
    yield "memory", NeuralMemory(4, chunk_size=4, **gates), features
    transformer = {"depth": 2, "segment_len": 4, "num_longterm_mem_tokens": 1, "heads": 2, "dim_head": 4}
    yield (
        "transformer",
        MemoryAsContextTransformer(num_tokens=11, dim=8, neural_mem_weight_residual=True, **transformer),
        ids,
    )
    for variant in ("mac", "mag", "mal", "lmm"):
        yield variant, build_model(ModelConfig(variant=variant, chunk_size=4, **sizes)), ids


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    torch.manual_seed(0)
    for name, model, row in models():
        model = DistributedDataParallel(model)
        for lengths in STEPS:
            model.zero_grad()
            result = model(row(lengths[rank % 2]))
            (result[0] if isinstance(result, tuple) else result).sum().backward()
        found[name] = sum(float(p.grad.square().sum()) for p in model.parameters() if p.requires_grad)
    (out / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(Path(sys.argv[1]))
