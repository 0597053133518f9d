import importlib.util
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from titans_pytorch.memory_models import MemoryAttention, MemoryMLP
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.training.mac import MacConfig, build_mac
from titans_pytorch.training.metrics import read_metrics
from titans_pytorch.training.run import main

SCRIPT = Path(__file__).parents[2] / "train_mac.py"
CPU = torch.device("cpu")
TINY = {
    "--device": "cpu",
    "--threads": 1,
    "--dim": 16,
    "--depth": 2,
    "--heads": 2,
    "--dim-head": 8,
    "--segment-len": 8,
    "--seq-len": 16,
    "--batch-size": 2,
    "--neural-memory-layers": 2,
    "--neural-memory-segment-len": 4,
    "--neural-memory-batch-size": 8,
    "--memory-dim-head": 8,
    "--memory-heads": 2,
    "--eval-batch-size": 64,
    "--eval-stride": 16,
    "--prime-len": 10,
    "--sample-len": 6,
    "--validate-sequences": 2,
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_mac", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def arguments(text_file):
    tiny = [str(word) for pair in TINY.items() for word in pair]
    return [*tiny, "--data", str(text_file), "--data-limit", "3000"]


def run(script, arguments, out, *more):
    presets = script.PRESETS
    argv = [*arguments, "--out", str(out), *map(str, more)]
    return main(presets, build_mac, script.__doc__, default_preset="small", argv=argv, script=str(SCRIPT))


def memories(model):
    return [m for m in model.modules() if isinstance(m, NeuralMemory)]


def test_the_published_settings(script):
    config = script.PRESETS["enwik8"]
    model = config.model
    assert (model.dim, model.depth, model.neural_memory_layers) == (384, 8, (2, 4, 6))
    assert (model.segment_len, model.neural_memory_segment_len, model.neural_memory_batch_size) == (32, 4, 128)
    assert (model.num_persist_mem_tokens, model.num_longterm_mem_tokens, model.sliding_window_attn) == (4, 4, True)
    assert (model.memory_heads, model.memory_dim_head, model.memory_depth) == (4, 64, 2)
    train = config.training
    assert (train.seq_len, train.batch_size, train.grad_accum, train.lr, train.clip) == (512, 4, 4, 2e-4, 0.5)
    assert (train.validate_every, config.report.sample_every, config.report.sample_len) == (100, 500, 512)
    layers = memories(build_mac(model, CPU))
    assert len(layers) == 3
    assert [m.heads for m in layers] == [4, 4, 4]
    assert [m.accept_weight_residual for m in layers] == [False, True, True]


def test_the_small_model_with_and_without_memory(script):
    config = script.PRESETS["small"].model
    model, without = (build_mac(c, CPU) for c in (config, MacConfig(**{**config.__dict__, "memory": False})))
    assert len(memories(model)) == 1
    assert memories(without) == []
    names = dict(model.named_parameters())
    assert {n: p.shape for n, p in without.named_parameters()}.items() <= {n: p.shape for n, p in names.items()}.items()


def test_the_switches_reach_the_memory(script):
    switches = {"use_symplectic_gating": True, "num_pages": 3, "symplectic_page_threshold": 0.25}
    tiny = {"dim": 16, "depth": 1, "dim_head": 8, "heads": 2, "neural_memory_layers": None, "memory_heads": 2}
    (memory,) = memories(build_mac(MacConfig(**tiny, **switches), CPU))
    assert memory.symplectic_gate is not None
    assert memory.internal_heads == 2 * 3
    assert memory.symplectic_page_threshold == 0.25
    assert isinstance(memory.engine.model.model, MemoryMLP)
    more = {"use_mem_attention_model": True, "use_accelerated_scan": True, "memory_expansion_factor": 3.0}
    (memory,) = memories(build_mac(MacConfig(**tiny, **more), CPU))
    assert isinstance(memory.engine.model.model, MemoryAttention)
    assert memory.memory_model_parameters[-1].shape == (2, 3 * 64, 64)
    assert script.SWITCHES.keys() == {*switches, "use_mem_attention_model", "use_accelerated_scan"}
    assert all(
        getattr(c.model, name) == value for c in script.PRESETS.values() for name, value in script.SWITCHES.items()
    )


def test_the_memory_loss_reaches_the_training_loss(script, arguments, tmp_path):
    def first_loss(name, *more):
        assert run(script, arguments, tmp_path / name, "--steps", 1, "--warmup-steps", 1, *more) == 0
        return read_metrics(tmp_path / name / "metrics.jsonl")[0]["loss"]

    plain, one, two = first_loss("a"), *(first_loss(w, "--memory-loss-weight", w) for w in ("0.5", "1"))
    assert one > plain
    assert two - plain == pytest.approx(2 * (one - plain), rel=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--num-pages", "2"], "num_pages > 1 needs use_symplectic_gating or use_dmd_gating"),
        (["--neural-memory-layers", "3"], "neural_memory_layers must be layers from 1 to 2, got (3,)"),
        (
            ["--neural-memory-batch-size", "6"],
            "neural_memory_batch_size must be a multiple of the store chunk size, 4, got 6",
        ),
    ],
)
def test_a_model_that_cannot_be_built(script, arguments, tmp_path, capsys, wrong, message):
    assert run(script, arguments, tmp_path / "run", *wrong) == 1
    error = capsys.readouterr().err
    assert f"train_mac.py: the model cannot be built: {message}" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [[], ["--no-memory"], ["--use-symplectic-gating", "--num-pages", "2"]])
def test_it_learns_evaluates_and_writes(script, arguments, tmp_path, more):
    out = tmp_path / "run"
    assert run(script, arguments, out, "--steps", 20, "--warmup-steps", 2, "--lr", 0.02, *more) == 0
    found = json.loads((out / "result.json").read_text())
    assert found["held_out_bits_per_byte"] < 5.0 < math.log2(256)
    assert found["command"].startswith(f"python {SCRIPT}")
    assert (out / "sample.txt").exists()


def test_page_switches_are_shown(script, arguments, tmp_path, capsys):
    out, pages = tmp_path / "run", ["--use-symplectic-gating", "--num-pages", 2, "--symplectic-page-threshold", -1]
    assert run(script, arguments, out, "--steps", 1, "--neural-memory-layers", "1,2", *pages) == 0
    logged = [record["page_switches"] for record in read_metrics(out / "metrics.jsonl") if "page_switches" in record]
    counted = json.loads((out / "result.json").read_text())["page_switches"]
    assert logged == [counted]
    assert list(counted) == ["layers.0.memory", "layers.1.memory"]
    # 2 rows of 20 tokens with the long-term ones, in training and in validation: a switch in each 8 that begin
    assert list(counted.values()) == [12, 12]
    assert "page switches [12, 12], " in capsys.readouterr().out


def test_killed_and_resumed(script, arguments, tmp_path):
    settings = [*arguments, "--steps", "20", "--checkpoint-every", "5", "--use-symplectic-gating", "--num-pages", "2"]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert run(script, settings, whole) == 0
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--preset", "small", *settings, "--out", str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    stop_at, deadline = random.randrange(3, 15), time.monotonic() + 60
    while len(read_metrics(out / "metrics.jsonl")) < stop_at and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert run(script, settings, out, "--resume") == 0
    losses = [[(r["step"], r.get("loss")) for r in read_metrics(o / "metrics.jsonl")] for o in (whole, out)]
    assert losses[0] == losses[1]
    assert (whole / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_the_header_takes_the_package_from_here():
    header = re.search(r"# /// script\n(.*?)# ///\n", SCRIPT.read_text(), re.S).group(1)
    assert '"titans-pytorch[examples]"' in header
    assert 'titans-pytorch = { path = ".", editable = true }' in header
    assert SCRIPT.read_text().index("python train_mac.py") < 1000
