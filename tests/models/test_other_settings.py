"""The settings that the READMEs of other implementations print: they open, or a line says what replaces them."""

import dataclasses
import logging

import pytest
import torch

from titans_pytorch import (
    DEFAULT_CONFIG,
    VARIANT_CONFIGS,
    MemoryAsContextTransformer,
    ModelConfig,
    NeuralMemory,
    TitansConfig,
    build_model,
)
from titans_pytorch.models.other_settings import TABLE, Replaced
from titans_pytorch.training.config import TaskConfig

from .. import helpers

# of Neuranox/titans-memory: the README, the training example, and a file that `to_json` writes there
NEURANOX = {
    **{"variant": "MAC", "d_model": 512, "n_layers": 12, "mem_layers": 2, "n_persistent": 16, "chunk_size": 64},
    **{"use_momentum": True, "use_decay": True},
}
NEURANOX_EXAMPLE = {
    **{"variant": "MAG", "vocab_size": 512, "d_model": 128, "n_layers": 2, "mem_layers": 2, "n_persistent": 4},
    **{"chunk_size": 16, "window": 32, "ffn_mult": 2, "max_seq_len": 64, "lr": 3e-4, "weight_decay": 0.1},
    **{"warmup_steps": 10, "grad_clip": 1.0, "model_name": "demo-mag"},
}
NEURANOX_FILE = NEURANOX | {
    **{"vocab_size": 32_000, "d_hidden": None, "ffn_mult": 4, "window": 512, "max_seq_len": 4096, "lr": 4e-4},
    **{"min_lr": 4e-5, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "warmup_steps": 2000, "grad_clip": 1.0},
    **{"batch_size": 524_288, "train_tokens": 15_000_000_000, "model_name": "titans"},
}
# of AmayaGS/Titans_LTMM: the README, and what the file has beyond it
AMAYA = """
model:
  variant: "MAC"
  d_model: 32
  n_heads: 2
  memory_layers: 2
  persistent_memory_size: 8
data:
  dataset: "copy_task"
  seq_len: 96
  vocab_size: 10
  num_samples: 1000
training:
  batch_size: 4
  learning_rate: 0.0001
  max_epochs: 200
  gradient_clip: 1.0
"""
AMAYA_FILE = {
    "model": {
        **{"variant": "MAC", "d_model": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 10, "max_seq_len": 96},
        **{"memory_layers": 2, "persistent_memory_size": 8, "memory": {"window_size": 24, "segment_size": 32}},
    },
    "training": {
        **{"batch_size": 4, "learning_rate": 0.0001, "weight_decay": 0.1, "max_epochs": 100, "gradient_clip": 1.0},
        **{"run_comparison": False, "optimizer": "adamw"},
    },
    "data": {"dataset": "copy_task", "seq_len": 64, "vocab_size": 10, "num_samples": 1000, "train_ratio": 0.8},
    "seed": 42,
    "logging": {"log_level": "INFO", "log_every": 10},
    "paths": {"data_dir": "./data", "log_dir": "./logs", "results_dir": "./results"},
}
# of r-baldridge/consciousness: the README, and the file
BALDRIDGE = {
    **{"hidden_dim": 2048, "num_layers": 24, "num_heads": 16, "head_dim": 128, "memory_dim": 256, "memory_layers": 2},
    **{"memory_lr": 0.01, "surprise_threshold": 0.1, "variant": "MAG"},
}
BALDRIDGE_FILE = {
    "model": BALDRIDGE
    | {
        **{"vocab_size": 50257, "mlp_expansion": 4, "context_length": 8192, "dropout": 0.0, "layer_norm_eps": 1e-6},
        **{"use_bias": True, "tie_embeddings": True, "initializer_range": 0.02, "memory_loss_weight": 0.1},
        **{"gate_init_bias": -2.0},
    },
    "training": {
        **{"optimizer": "adamw", "learning_rate": 1e-4, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8},
        **{"lr_scheduler": "cosine", "warmup_steps": 2000, "min_lr_ratio": 0.1, "batch_size": 16},
        **{"gradient_accumulation_steps": 4, "max_steps": 200_000, "eval_interval": 1000, "save_interval": 5000},
        **{"log_interval": 10, "max_grad_norm": 1.0, "mixed_precision": "bf16", "gradient_checkpointing": True},
        **{"stage1_steps": 100_000, "stage2_steps": 100_000},
    },
    "data": {
        **{"dataset": "openwebtext", "tokenizer": "gpt2", "max_length": 8192, "num_workers": 4, "prefetch_factor": 2}
    },
    "evaluation": {"batch_size": 8, "max_eval_samples": 1000},
    "logging": {"project": "titans", "entity": None, "log_to_wandb": False, "log_dir": "./logs"},
    "hardware": {"seed": 42, "device": "cuda", "num_gpus": 1, "compile_model": True},
    "mac": {"model": {"variant": "MAC", "memory_key_dim": 64, "memory_value_dim": 64, "num_memory_slots": 64}},
    "small": {"model": {"hidden_dim": 768}},
    "test_time": {
        **{"memory_lr": 0.01, "max_update_steps": 1, "surprise_threshold": 0.1, "reset_memory_on_new_doc": True}
    },
}


def changed(config):
    """Settings that differ from the defaults, flat."""
    found = {}
    for section in ("model", "training", "report"):
        made, default = getattr(config, section), getattr(TitansConfig(), section)
        found |= {name: value for name, value in vars(made).items() if value != getattr(default, name)}
    return found


def test_flat_and_in_capitals(caplog):
    config = TitansConfig(**NEURANOX)
    assert changed(config) == {"d_model": 512, "n_layers": 12, "n_persistent": 16, "window": 64}
    assert config.model.chunk_size == 64
    assert caplog.messages == ["chunk_size 64: window 64 (chunk_size too: with MAC it is also the segment)"]
    assert caplog.records[0].levelno == logging.WARNING  # seen where no logging is set up
    assert config == TitansConfig.of(d_model=512, n_layers=12, n_persistent=16, window=64)
    assert build_model(config, "meta").config == config.model


@pytest.mark.parametrize("variant", ["MAC", "MAG", "MAL", "LMM", "baseline"])
def test_variants_in_capitals(variant):
    lower = variant.lower()
    assert TitansConfig(variant=variant).model.variant == lower
    assert TitansConfig.tiny(variant=variant) == TitansConfig.tiny(variant=lower)
    assert TitansConfig.of(variant=variant) == TitansConfig.of(variant=lower)
    assert ModelConfig(variant=variant) == ModelConfig(variant=lower)
    assert TitansConfig.from_yaml(f"model: {{variant: {variant}}}").model.variant == lower
    small = TitansConfig(variant=variant, d_model=16, n_layers=1, n_heads=2, mem_heads=2, chunk_size=4, window=4)
    assert build_model(small)(torch.randint(0, 256, (1, 9))).shape == (1, 9, 256)


def test_flat_settings_of_ours(caplog):
    config = TitansConfig(variant="mag", data="x.txt", lr=1e-3, name="mine")
    assert config == dataclasses.replace(TitansConfig.of(variant="mag", data="x.txt", lr=1e-3), name="mine")
    task = TitansConfig(task="copy", settings={"payload": 3}, test_rows=9)
    assert task.data == TaskConfig(task="copy", settings={"payload": 3}, test_rows=9)
    assert not caplog.messages
    with pytest.raises(ValueError, match="unknown setting windo; the nearest is window"):
        TitansConfig(windo=3)


def test_neuranox():
    assert changed(TitansConfig(**NEURANOX_EXAMPLE)) == {
        **{"variant": "mag", "vocab_size": 512, "n_layers": 2, "chunk_size": 16, "window": 32, "ffn_mult": 2.0},
        **{"seq_len": 64, "lr": 3e-4, "warmup_steps": 10, "clip": 1.0},
    }
    config = TitansConfig.from_dict(NEURANOX_FILE)
    assert config.name == "titans"
    assert changed(config) == {
        **{"vocab_size": 32_000, "d_model": 512, "n_layers": 12, "n_persistent": 16, "window": 512},
        **{"seq_len": 4096, "lr": 4e-4, "warmup_steps": 2000, "clip": 1.0, "batch_size": 128, "steps": 28_610},
    }
    assert config.training.min_lr_ratio == pytest.approx(0.1)
    assert TitansConfig(variant="MAC", d_hidden=100).model.mem_heads == 1


def test_amaya(caplog):
    config = TitansConfig.from_yaml(AMAYA)
    assert changed(config) == {
        **{"vocab_size": 11, "d_model": 32, "n_heads": 2, "n_persistent": 8},
        **{"seq_len": 95, "steps": 40_000, "lr": 1e-4, "clip": 1.0},
    }
    assert config.data == TaskConfig(task="copy", settings={"payload": 47, "symbols": 9}, test_rows=200)
    assert "memory_layers 2: mem_layers 2" in caplog.messages
    assert TitansConfig.from_yaml(config.to_yaml()) == config
    caplog.clear()
    mac = TitansConfig.from_dict(AMAYA_FILE)
    assert (mac.model.window, mac.training.seq_len, mac.training.seed, mac.training.steps) == (32, 63, 42, 20_000)
    assert "window_size 24: not used (MAC does not use it)" in caplog.messages
    mal = TitansConfig.from_dict(AMAYA_FILE | {"model": AMAYA_FILE["model"] | {"variant": "MAL"}})
    assert (mal.model.window, mal.model.variant) == (24, "mal")


@pytest.mark.parametrize(
    ("dataset", "task", "settings"),
    [
        ("copy", "copy", {"payload": 47, "symbols": 9}),
        ("pattern", "patterns", {"shortest_period": 2, "longest_period": 4, "symbols": 9}),
        ("language_modeling", "patterns", {"shortest_period": 2, "longest_period": 4, "symbols": 9}),
        ("needle", "needle", {"kind": "position", "hay": 8}),
        ("needle_haystack", "needle", {"kind": "position", "hay": 8}),
    ],
)
@pytest.mark.parametrize("variant", ["MAC", "baseline"])
def test_datasets(dataset, task, settings, variant):
    """They are tasks that a reference solves, in rows that the model reads."""
    from titans_pytorch.tasks.subject import checked_task

    text = AMAYA.replace("copy_task", dataset).replace("MAC", variant)
    config = TitansConfig.from_yaml(text)
    assert (config.data.task, config.data.settings, config.model.variant) == (task, settings, variant.lower())
    found = checked_task(config)
    rows = found.batch(0, 3)
    assert rows.ids.shape == (3, 95)
    assert found.score(found.reference, sequences=5).accuracy == 1.0
    assert build_model(config)(rows.ids).shape == (3, 95, config.model.vocab_size)


@pytest.mark.parametrize("dataset", ["copy_task", "patterns", "needle_haystack"])
@pytest.mark.parametrize("length", [65, 600])
def test_datasets_of_any_length(dataset, length):
    from titans_pytorch.tasks.subject import checked_task

    config = TitansConfig(dataset=dataset, num_samples=100, seq_len=length, vocab_size=12)
    rows = checked_task(config).batch(0, 2).ids
    assert rows.shape[1] + 1 >= config.training.seq_len >= length - 1
    assert int(rows.max()) < config.model.vocab_size


def test_baldridge(caplog):
    config = TitansConfig(**BALDRIDGE)
    assert changed(config) == {
        **{"variant": "mag", "d_model": 2048, "n_layers": 24, "n_heads": 16, "d_hidden": 256, "mem_heads": 1},
        **{"max_step": 0.01, "surprise_source": "prediction", "surprise_threshold": 0.1 / 2048, "gate": "convex"},
        **{"memory_loss_weight": 0.1},
    }
    assert caplog.messages[0] == "hidden_dim 2048: d_model 2048"
    assert build_model(config, "meta").blocks[0].layer.gate.kind == "convex"
    assert BALDRIDGE.items() <= DEFAULT_CONFIG.items()
    assert TitansConfig(**DEFAULT_CONFIG).training.lr == 1e-4
    gated = TitansConfig(**DEFAULT_CONFIG | VARIANT_CONFIGS["MAG"]).model
    assert (gated.gate, gated.init_gate_bias) == ("convex", -2.0)
    for name in ("MAC", "MAL"):
        model = TitansConfig(**DEFAULT_CONFIG | VARIANT_CONFIGS[name]).model
        assert (model.variant, model.gate) == (name.lower(), "normalised")


def test_the_file_of_baldridge():
    with pytest.raises(ValueError) as seen:
        TitansConfig.from_dict(BALDRIDGE_FILE)
    assert str(seen.value) == (
        "tokenizer is replaced by vocab_size: titans train reads bytes, and build_model's models read any ids; "
        "dataset openwebtext is replaced by data: a text file, or by a task: copy, copy_task, pattern, patterns, "
        "language_modeling, needle, needle_haystack, needle_in_haystack"
    )
    data = {name: value for name, value in BALDRIDGE_FILE["data"].items() if name not in ("dataset", "tokenizer")}
    config = TitansConfig.from_dict(BALDRIDGE_FILE | {"data": data | {"data": "my.txt"}})
    assert (
        changed(config).items()
        >= {
            **{"steps": 200_000, "core_steps": 100_000, "seq_len": 8192, "grad_accum": 4, "batch_size": 16},
            **{
                "init": "normal",
                "init_gate_bias": -2.0,
                "precision": "bfloat16",
                "validate_every": 1000,
                "device": "cuda",
            },
            **{"eval_batch_size": 8, "validate_sequences": 1000, "tie_embeddings": True, "seed": 42},
        }.items()
    )
    assert config.data.data == "my.txt"


@pytest.mark.parametrize("name", [name for name, reading in TABLE.items() if isinstance(reading, Replaced)])
def test_what_something_replaces(name):
    with pytest.raises(ValueError, match=f"^{name} is replaced by [a-z_]+: |^{name} is replaced by [a-z_]+, "):
        TitansConfig(**{name: 1})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hidden_dim": 64, "num_heads": 4, "head_dim": 8}, "head_dim must be hidden_dim / num_heads..., got 8"),
        ({"hidden_dim": 64, "d_model": 32}, "d_model cannot be combined with another: 64 and 32"),
        ({"hidden_dim": "wide"}, "hidden_dim must be a number, got 'wide'"),
        ({"memory_layer": 3}, "unknown setting memory_layer; the nearest is mem"),
        ({"dropout": 0.1}, "dropout must be 0: there is none here"),
        ({"max_epochs": 3}, "max_epochs needs num_samples and dataset; otherwise give steps"),
        ({"dataset": "c4"}, "dataset c4 is replaced by data"),
        ({"mixed_precision": "fp16"}, "mixed_precision must be bf16 or fp32..., got 'fp16'"),
        ({"max_seq_len": 100, "batch_size": 250}, "batch_size must be a multiple of max_seq_len = 100..., got 250"),
        ({"train_tokens": 5}, "train_tokens needs batch_size and max_seq_len"),
        ({"run_comparison": True}, "run_comparison must be False: all variants: python benchmarks/"),
        ({"persistent_memory_size": -1}, "n_persistent must be ..., got -1"),
        ({"initializer_range": 0.05, "init": "xavier"}, "initializer_range cannot be combined with another init: "),
        (
            {"hidden_dim": 64, "n_heads": 4, "surprise_threshold": 0.6, "surprise_source": "memory"},
            "surprise_threshold 0.6 beside hidden_dim cannot be combined with another surprise_source: 'memory' and ",
        ),
        ({"dataset": "copy", "task": "needle"}, "dataset 'copy' cannot be combined with another task: 'needle' and "),
        ({"dataset": "copy", "settings": {"payload": 3}}, "dataset 'copy' cannot be combined with another settings: "),
        (
            {"dataset": "copy", "num_samples": 100, "test_rows": 3},
            "num_samples 100 cannot be combined with another test_rows: 3 and 20",
        ),
        ({"variant": "MAX"}, "variant must be one of mac, mag, mal, lmm, baseline, got 'max'"),
    ],
)
def test_wrong_settings(given, message):
    with pytest.raises(ValueError, match=helpers.message(message)):
        TitansConfig(**given)


def test_the_gate_of_all_variants():
    """gate_init_bias is not dropped where the gate is convex, whatever the variant."""
    for own in ({"variant": "mac"}, {}):
        assert TitansConfig(gate="convex", gate_init_bias=-2.0, **own).model.init_gate_bias == -2.0


def test_titans_pytorch():
    """The settings of lucidrains/titans-pytorch's README, on shorter sequences."""
    memory = NeuralMemory(dim=384, chunk_size=64)
    seq = torch.randn(1, 130, 384)
    retrieved, _ = memory(seq)
    assert retrieved.shape == seq.shape
    transformer = MemoryAsContextTransformer(
        num_tokens=256, dim=256, depth=2, segment_len=128, num_persist_mem_tokens=4, num_longterm_mem_tokens=16
    )
    ids = torch.randint(0, 256, (1, 140))
    transformer(ids, return_loss=True).backward()
    assert transformer.sample(ids[:, :4], 6).shape == (1, 2)


def test_the_fork():
    """The settings of displague/titans-pytorch's README."""
    paged = NeuralMemory(dim=64, chunk_size=32, use_symplectic_gating=True, num_pages=4)
    paged.symplectic_page_threshold = 0.2
    gate = {"gated": True, "diag": True, "gate_mode": "soft", "top_k": 8, "phase_mix": 0.5, "phase_pairs": 4}
    both = NeuralMemory(
        dim=64,
        chunk_size=32,
        use_symplectic_gating=True,
        use_dmd_gating=True,
        combine_symplectic_and_dmd=True,
        num_pages=2,
        symplectic_gate_kwargs=gate,
    )
    for memory in (NeuralMemory(dim=64, chunk_size=32, use_symplectic_gating=True), paged, both):
        out, _ = memory(torch.randn(1, 96, 64))
        assert out.shape == (1, 96, 64)
        assert out.isfinite().all()
