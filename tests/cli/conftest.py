import importlib.util
from pathlib import Path

import pytest

from titans_pytorch.cli.main import main
from titans_pytorch.training.run import main as script_main

TINY = """
model: {variant: VARIANT, vocab_size: 256, d_model: 16, n_layers: 1, n_heads: 2, mem_heads: 2, mem_layers: 1,
        n_persistent: 2, window: 8, chunk_size: 4, max_step: 0.5}
training: {steps: 3, batch_size: 4, seq_len: 24, lr: 1e-2, warmup_steps: 1, threads: 1, device: cpu,
           validate_every: 3, validate_sequences: 4}
report: {sample_len: 8, prime_len: 4, eval_batch_size: 64, eval_stride: 24}
DATA
"""


def tiny_yaml(folder, data, variant="mac"):
    path = folder / f"tiny-{variant}.yaml"
    path.write_text(TINY.replace("VARIANT", variant).replace("DATA", data))
    return str(path)


@pytest.fixture(scope="session")
def text_run(text_file, tmp_path_factory):
    """(folder of a run on text, its configuration's file)"""
    folder = tmp_path_factory.mktemp("text_run")
    config = tiny_yaml(folder, f"data: {{data: {text_file}, data_limit: 3000}}")
    assert main(["train", "--config", config, "--out", str(folder / "run")]) == 0
    return folder / "run", config


@pytest.fixture(scope="session")
def task_run(tmp_path_factory):
    """The same on a task, with fewer tokens than there are bytes."""
    folder = tmp_path_factory.mktemp("task_run")
    task = "data: {task: copy, settings: {payload: 4, segment_len: 8}, test_times: [1, 2], test_rows: 12}"
    config = tiny_yaml(folder, task, "lmm")
    assert main(["train", "--config", config, "--vocab-size", "18", "--out", str(folder / "run")]) == 0
    return folder / "run", config


MAC = {
    "--device": "cpu",
    "--threads": 1,
    "--dim": 16,
    "--depth": 3,
    "--heads": 2,
    "--dim-head": 8,
    "--segment-len": 8,
    "--seq-len": 24,
    "--batch-size": 2,
    "--steps": 2,
    "--neural-memory-layers": "2,3",
    "--neural-memory-segment-len": 4,
    "--neural-memory-batch-size": 8,
    "--memory-dim-head": 8,
    "--memory-heads": 2,
    "--eval-limit": 120,
    "--prime-len": 10,
    "--sample-len": 6,
    "--validate-sequences": 2,
    "--data-limit": 6000,
}


def train_mac(out, text_file, *more):
    """A run of train_mac.py, the published settings made tiny."""
    path = Path(__file__).parents[2] / "train_mac.py"
    spec = importlib.util.spec_from_file_location("train_mac", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    words = [str(word) for pair in MAC.items() for word in pair]
    argv = ["--preset", "enwik8", "--data", str(text_file), *words, *more, "--out", str(out)]
    assert script_main(script.PRESETS, script.build_mac, "", default_preset="small", argv=argv, script=str(path)) == 0
    return out


@pytest.fixture(scope="session")
def mac_run(text_file, tmp_path_factory):
    """The folder of a run of train_mac.py, with pages and everything that the published settings switch on."""
    pages = ["--use-symplectic-gating", "--num-pages", "2", "--symplectic-page-threshold", "0.1"]
    return train_mac(tmp_path_factory.mktemp("mac_run") / "run", text_file, *pages), None
