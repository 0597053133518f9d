"""Presets. All variants of a preset have the same number of parameters, within a few percent: a wider feed-forward
makes up for parts that a variant lacks.

From the paper: vocabulary (Llama 2's tokenizer), length, batch (half a million tokens), optimizer, learning rate,
weight decay and number of tokens (15B, for large 30B). Not published, and chosen here: width, depth, heads, lengths of
segment and chunk, persistent tokens, warm-up, clipping.
"""

from dataclasses import replace

from titans_pytorch.models.config import ModelConfig, TitansConfig
from titans_pytorch.training.config import DataConfig, TrainConfig

TOKENS_PER_STEP = 4096 * 8 * 16


def _paper(tokens: float) -> TrainConfig:
    return TrainConfig(
        steps=round(tokens / TOKENS_PER_STEP),
        seq_len=4096,
        batch_size=8,
        grad_accum=16,
        lr=4e-4,
        warmup_steps=1000,
        weight_decay=0.1,
        clip=1.0,
        validate_every=1000,
        checkpoint_every=1000,
    )


def _sized(d_model: int, n_layers: int, n_heads: int, ffn_mult: float) -> ModelConfig:
    return ModelConfig(
        vocab_size=32_000,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        mem_heads=n_heads,
        ffn_mult=ffn_mult,
        n_persistent=16,
        window=512,
        chunk_size=64,
    )


PRESETS = {
    # minutes on two CPU cores
    "tiny": TitansConfig(
        ModelConfig(d_model=64, n_layers=2, n_heads=2, mem_heads=2, window=64, chunk_size=32),
        DataConfig(data_limit=10_000_000),
        TrainConfig(steps=500, batch_size=4, seq_len=256, lr=2e-3, warmup_steps=50, clip=1.0),
    ),
    "small": TitansConfig(_sized(768, 12, 12, 4.0), training=_paper(15e9)),
    "medium": TitansConfig(_sized(1024, 16, 16, 3.5), training=_paper(15e9)),
    "large": TitansConfig(_sized(1536, 16, 24, 4.0), training=_paper(30e9)),
}


def lacks(config: ModelConfig, variant: str) -> float:
    """Return how many parameters of a block a variant lacks beside mac, in d_model^2: attention's, or the memory's maps
    and initial fast weights (two matrices from d_head to 4 d_head for each head)."""
    return {"lmm": 4.0, "baseline": 5.0 + 8.0 / config.mem_heads}.get(variant, 0.0)


def preset(name: str, variant: str = "mac") -> TitansConfig:
    config = PRESETS[name]
    # a feed-forward has 3 matrices of d_model x (2/3 ffn_mult d_model)
    ffn_mult = config.model.ffn_mult + lacks(config.model, variant) / 2
    return replace(config.replace(variant=variant, ffn_mult=ffn_mult), name=name)
