"""Text: trains on windows of bytes, measures bits per byte beside compressors, and lets the model continue a text."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from titans_pytorch.common.checks import wrong
from titans_pytorch.common.files import write_text
from titans_pytorch.training.checkpoint import check_finite
from titans_pytorch.training.config import DataConfig, ReportConfig, RunConfig, TrainConfig
from titans_pytorch.training.data import ByteData, Windows, load_data
from titans_pytorch.training.errors import Diverged
from titans_pytorch.training.evaluate import bits_per_byte, compressors, estimate_bits_per_byte, sample_text
from titans_pytorch.training.plots import draw_loss_curve
from titans_pytorch.training.subjects import Context

__all__ = ["Text", "text_of"]


class Text:
    """See `subjects.Subject`."""

    unit, counted = "byte", "bytes"

    def __init__(self, data: ByteData, config: TrainConfig, report: ReportConfig | None = None):
        self.data, self.config, self.report = data, config, report or ReportConfig()
        self.row_len, self.fingerprint = config.seq_len, f"sha256 {data.sha256}"
        self.windows = Windows(data.train, config.seq_len, config.seed)

    def batch(self, position: int, size: int) -> Tensor:
        self.data.check()
        return self.windows.batch(position, size)

    def tokens(self, position: int, rows: int) -> int:
        return rows * self.row_len

    def introduce(self) -> str:
        data = self.data
        return f"data: {data.name}, {len(data.train):,} bytes to train on, {len(data.held_out):,} held out"

    def measure(self, model: nn.Module, device: torch.device, autocast: Context) -> dict[str, float]:
        bits = estimate_bits_per_byte(
            model,
            self.data.held_out,
            seq_len=self.config.seq_len,
            sequences=self.config.validate_sequences,
            batch_size=self.config.batch_size,
            device=device,
            autocast=autocast,
        )
        return {"held_out_bits_per_byte": bits}

    def on_step(self, model: nn.Module, step: int, device: torch.device, autocast: Context) -> None:
        every = self.report.sample_every
        if every and step % every == 0 and step < self.config.steps:
            print(f"\n{self.sample(model, step, device, autocast)[1]}\n")

    def sample(self, model: nn.Module, step: int, device: torch.device, autocast: Context) -> tuple[str, str]:
        """Return (held-out bytes, the model's continuation). Diverged where the model is not finite."""
        check_finite(model)
        return sample_text(
            model,
            self.data.held_out[: self.report.prime_len],
            self.report.sample_len,
            temperature=self.report.temperature,
            seed=self.config.seed + step,
            device=device,
            autocast=autocast,
        )

    def conclude(self, model: nn.Module, out: Path, device: torch.device, autocast: Context) -> dict[str, Any]:
        context = self.config.seq_len
        text, whole = self.data.held_out[: self.report.eval_limit or None], len(self.data.held_out)
        part = f"all {whole:,}" if len(text) == whole else f"the first {len(text):,} of {whole:,}"
        began = time.perf_counter()
        bits = bits_per_byte(
            model,
            text,
            context=context,
            stride=self.report.eval_stride or max(1, context // 2),
            batch_size=self.report.eval_batch_size,
            device=device,
            autocast=autocast,
            progress=True,
            say=print,
        )
        if not math.isfinite(bits):
            raise Diverged(f"the final held_out_bits_per_byte is {bits}")
        seconds = time.perf_counter() - began
        others = compressors(text)
        print(f"\nbits per byte on {part} held-out bytes, each counted once ({seconds:.0f} s)")
        for name, value in {"this model": bits, **others}.items():
            print(f"  {name:<16} {value:.3f}")
        print("  (the model has learned from the other part of the data; gzip and xz see these bytes alone)")
        prime, written = self.sample(model, self.config.steps, device, autocast)
        print(f"\nsampled text, after {prime[-60:]!r}:\n{written}\n")
        write_text(out / "sample.txt", f"{prime}\n--- written by the model ---\n{written}\n")
        return {
            "held_out_bits_per_byte": bits,
            "compared_with": others,
            "evaluated_bytes": len(text),
            "evaluation_seconds": round(seconds, 1),
            "data": self.data.describe(),
        }

    def draw(self, out: Path, found: dict[str, Any]) -> list[str]:
        others = found.get("compared_with", {})
        levels = {name: value for name, value in others.items() if name != "order-0 entropy"}
        drawn = draw_loss_curve(out / "metrics.jsonl", out / "loss.png", str(out), self.unit, levels)
        return ["loss.png"] if drawn else []


def text_of(config: RunConfig) -> Text:
    """Find and load the text that the settings in `config` name."""
    if not isinstance(config.data, DataConfig):
        raise wrong("data", config.data, "a DataConfig")
    return Text(load_data(config.data), config.training, config.report)
