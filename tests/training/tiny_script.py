"""A training script with a model small enough for tests: `python tiny_script.py --steps 5`, or `run([...])`."""

import os
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from titans_pytorch.training.config import DataConfig, ReportConfig, RunConfig, TrainConfig, setting
from titans_pytorch.training.run import main


@dataclass(frozen=True)
class TinyConfig:
    """A recurrent model."""

    width: int = setting(16, "width")
    layers: tuple[int, ...] | None = setting((1, 2), "not used")
    nan_at_step: int = setting(0, "the loss is not finite at this step")


class TinyModel(nn.Module):
    """With dropout, so that training depends on the global random number generator."""

    def __init__(self, width: int, nan_at_step: int = 0):
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.mix = nn.GRU(width, width, batch_first=True)
        self.drop = nn.Dropout(0.1)
        self.out = nn.Linear(width, 256)
        self.nan_at_step, self.calls = nan_at_step, 0

    def forward(self, ids, return_loss=False):
        if not return_loss:
            if not self.training and len(ids) > 4:  # the final evaluation
                time.sleep(float(os.environ.get("TINY_SLEEP_AT_END", "0")))
            return self.out(self.drop(self.mix(self.embed(ids))[0]))
        loss = F.cross_entropy(self(ids[:, :-1]).transpose(1, 2), ids[:, 1:])
        if self.training:
            time.sleep(float(os.environ.get("TINY_SLEEP", "0")))
            self.calls += 1
            if self.calls == self.nan_at_step:
                loss = loss * torch.nan
        return loss

    @torch.no_grad()
    def sample(self, prompt, seq_len, temperature=1.0, use_cache=False, show_progress=True):
        out = prompt
        while out.shape[1] < seq_len:
            chances = (self(out)[:, -1] / max(temperature, 1e-6)).softmax(-1)
            out = torch.cat([out, torch.multinomial(chances, 1)], 1)
        return out[:, prompt.shape[1] :]


PRESETS = {
    "tiny": RunConfig(
        model=TinyConfig(),
        data=DataConfig(),
        training=TrainConfig(
            steps=24,
            batch_size=2,
            grad_accum=2,
            seq_len=16,
            lr=1e-2,
            warmup_steps=4,
            threads=1,
            device="cpu",
            validate_every=6,
            validate_sequences=4,
            checkpoint_every=5,
        ),
        report=ReportConfig(sample_every=7, sample_len=8, prime_len=4),
    ),
    "wide": RunConfig(model=TinyConfig(width=24)),
}


def build(config: TinyConfig, device: torch.device) -> nn.Module:
    return TinyModel(config.width, config.nan_at_step).to(device)


def run(argv: list[str] | None = None) -> int:
    return main(PRESETS, build, __doc__, default_preset="tiny", argv=argv, script=__file__)


if __name__ == "__main__":
    sys.exit(run())
