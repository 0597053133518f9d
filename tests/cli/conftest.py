import pytest

from titans_pytorch.cli.main import main

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
