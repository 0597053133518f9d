# /// script
# requires-python = ">=3.10"
# dependencies = ["titans-pytorch[examples]"]
#
# [tool.uv.sources]
# titans-pytorch = { path = ".", editable = true }
# ///
"""Trains a memory-as-context transformer on bytes of text, evaluates it and lets it write.

python train_mac.py                              # in an environment with this package
uv run train_mac.py                              # or let uv make one

python train_mac.py --data my.txt --steps 500    # any file; every setting below is an option (--help)
python train_mac.py --no-memory                  # the same model without memory, to compare
python train_mac.py --resume                     # go on after Ctrl-C or a crash
"""

import sys

from titans_pytorch.training.config import DataConfig, ReportConfig, RunConfig, TrainConfig
from titans_pytorch.training.mac import MacConfig, build_mac
from titans_pytorch.training.options import script_help

USE_SYMPLECTIC_GATING = False
NUM_PAGES = 1
SYMPLECTIC_PAGE_THRESHOLD = 0.5
USE_MEM_ATTENTION_MODEL = False
USE_ACCELERATED_SCAN = True

SWITCHES = {
    "use_symplectic_gating": USE_SYMPLECTIC_GATING,
    "num_pages": NUM_PAGES,
    "symplectic_page_threshold": SYMPLECTIC_PAGE_THRESHOLD,
    "use_mem_attention_model": USE_MEM_ATTENTION_MODEL,
    "use_accelerated_scan": USE_ACCELERATED_SCAN,
}

PRESETS = {
    # for two CPU cores, in minutes: one memory, long chunks, no residual streams, and an optimizer that learns fast
    "small": RunConfig(
        model=MacConfig(
            dim=128,
            depth=4,
            heads=4,
            dim_head=32,
            num_residual_streams=1,
            segment_len=128,
            neural_memory_layers=(2,),
            neural_memory_segment_len=32,
            neural_memory_batch_size=64,
            neural_mem_weight_residual=False,
            neural_memory_qkv_receives_diff_views=False,
            memory_heads=4,
            memory_dim_head=32,
            **SWITCHES,
        ),
        data=DataConfig(data_limit=10_000_000),
        training=TrainConfig(
            steps=1600,
            batch_size=2,
            seq_len=512,
            optimizer="muon",
            lr=6e-3,
            min_lr_ratio=0.05,
            clip=1.0,
            validate_every=200,
        ),
    ),
    # the published settings, for a GPU
    "enwik8": RunConfig(
        model=MacConfig(**SWITCHES),
        training=TrainConfig(
            steps=100_000, batch_size=4, grad_accum=4, seq_len=512, lr=2e-4, clip=0.5, validate_every=100
        ),
        report=ReportConfig(eval_limit=0, sample_every=500, sample_len=512, prime_len=100),
    ),
}

if __name__ == "__main__":
    script_help(PRESETS, __doc__)
    import torch  # takes seconds: after --help was answered

    from titans_pytorch.training.run import main

    default = "enwik8" if torch.cuda.is_available() else "small"
    sys.exit(main(PRESETS, build_mac, __doc__, default_preset=default))
