"""Real text, byte by byte: a memory-as-context transformer is trained on one part and scored on a part held out.

Letters: b batch, n bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.arms import Arm
from harness.later import torch
from harness.task import Metric, Task

import titans_pytorch
from titans_pytorch.training.config import DataConfig
from titans_pytorch.training.errors import TrainingError

LIMIT = 4_000_000  # bytes of the data to use
HELD_OUT = 0.1
BITS = 1 / math.log(2)


@dataclass(frozen=True)
class Text(Task):
    """data: a file (plain, .gz or .zip), or "stdlib", the source text of Python's standard library. data_dir: folder of
    unpacked bytes. sha256: filled in, so that results identify their data. Arms are stated in
    keywords of the transformer's memories."""

    data: str = "stdlib"
    data_dir: str = "data"
    dim: int = 48
    depth: int = 2
    segment: int = 16
    length: int = 128
    batch_size: int = 4
    memory_dim: int = 24
    memory_segment: int = 4
    memory_batch: int = 16
    sha256: str = ""

    name = "text"
    metrics = (
        Metric("bits_per_byte", "lower", "on text held out"),
        Metric("bits_late", "lower", "bits per byte in the second half of each sequence, where more context precedes"),
    )

    def __post_init__(self):
        from titans_pytorch.training.data import find, sha256_of

        try:
            path = find(DataConfig(data=self.data, data_dir=self.data_dir), print)[1]
        except TrainingError as error:
            raise ValueError(error) from error
        size = min(path.stat().st_size, LIMIT)
        if size * HELD_OUT < 2 * self.length:
            raise ValueError(f"data: {path} has {size} bytes, takes at least {int(2 * self.length / HELD_OUT)}")
        object.__setattr__(self, "sha256", sha256_of(path, size))
        object.__setattr__(self, "_bytes", read_bytes(path, size))

    def memory(self) -> dict[str, Any]:
        return {"dim_head": self.memory_dim, "heads": 1, "qk_rmsnorm": True, "default_step_transform_max_lr": 0.1}

    def build(self, arm: Arm) -> torch.nn.Module:
        return titans_pytorch.MemoryAsContextTransformer(
            num_tokens=256,
            dim=self.dim,
            depth=self.depth,
            dim_head=self.dim // 2,
            heads=2,
            segment_len=self.segment,
            num_persist_mem_tokens=2,
            num_longterm_mem_tokens=2,
            num_residual_streams=2,
            neural_memory_layers=(self.depth,),
            neural_memory_segment_len=self.memory_segment,
            neural_memory_batch_size=self.memory_batch,
            neural_memory_model=titans_pytorch.MemoryMLP(self.memory_dim, depth=2, expansion_factor=2.0),
            neural_memory_kwargs={**self.memory(), **arm.memory},
        )

    def world(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the training part and the held-out part, the end of the data."""
        split = int(len(self._bytes) * (1 - HELD_OUT))
        return self._bytes[:split], self._bytes[split:]

    def batches(self, seed: int, part: str, count: int, device: str = "cpu"):
        source = self.source(part, seed)
        known = self.world(seed)[0 if part == "train" else 1]
        for _ in range(count):
            yield self.batch(known, source).to(device)

    def batch(self, world: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        starts = torch.randint(len(world) - self.length, (self.batch_size,), generator=generator)
        return torch.stack([world[s : s + self.length + 1] for s in starts.tolist()]).long()

    def loss(self, model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch, return_loss=True)

    def scores(self, model: torch.nn.Module, batch: torch.Tensor) -> Mapping[str, float]:
        logits = model(batch[:, :-1])
        bits = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none") * BITS
        return {"bits_per_byte": bits.mean(), "bits_late": bits[:, bits.shape[1] // 2 :].mean()}

    def constant(self, train, test) -> Mapping[str, float]:
        """Return the share of each byte in the whole training part."""
        counts = torch.bincount(self.world(0)[0].long(), minlength=256).double() + 1
        bits = -(counts / counts.sum()).log2()
        asked = [bits[batch[:, 1:]] for batch in test]
        late = [b[:, b.shape[1] // 2 :] for b in asked]
        return {"bits_per_byte": torch.cat(asked).mean().item(), "bits_late": torch.cat(late).mean().item()}


def read_bytes(path: Path, size: int) -> torch.Tensor:
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
