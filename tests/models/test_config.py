from dataclasses import fields
from pathlib import Path

import pytest

from titans_pytorch import ModelConfig, TitansConfig, build_model
from titans_pytorch.models.config import VARIANTS
from titans_pytorch.models.presets import PRESETS
from titans_pytorch.training.config import RunConfig, settings_of

from .. import helpers

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json"])
def test_files_both_ways(tmp_path, suffix):
    config = TitansConfig.small(variant="mal", d_hidden=100, window=7, lr=4e-4, data="x.txt", init_step_bias=-3.5)
    config.save(tmp_path / f"run.{suffix}")
    assert TitansConfig.load(tmp_path / f"run.{suffix}") == config
    assert [path.name for path in tmp_path.iterdir()] == [f"run.{suffix}"]


def test_what_is_missing_keeps_its_default():
    assert TitansConfig.from_yaml("") == TitansConfig.from_dict({}) == TitansConfig()
    config = TitansConfig.from_yaml("model:\n  window: 9\ntraining:\n  lr: 4e-4\n  clip: 1\n")
    assert config == TitansConfig.of(window=9, lr=0.0004, clip=1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {}", "unknown section modle; the nearest is model"),
        ("model: {windwo: 3}", "unknown setting model.windwo; the nearest is window"),
        ("training: {learning: 3}", "unknown setting training.learning"),
        ("model: {lr: 3}", "unknown setting model.lr"),
        ("model: {window: wide}", "window must be a whole number, got 'wide'"),
        ("model: {window: true}", "window must be a whole number, got True"),
        ("model: {window: 0}", "window must be ..., got 0"),
        ("model: {variant: max}", "variant must be one of mac, mag, mal, lmm, baseline, got 'max'"),
        ("model: {n_heads: 3}", "n_heads must be a divisor of d_model = 128..., got 3"),
        ("model: {mem_heads: 3}", "mem_heads must be a divisor of d_model = 128, got 3"),
        ("model: 3", "model must be a section of settings, got int"),
        ("- model", "configuration must be ..., got list"),
        ("model: [", "flow node"),
        ("model:\n  window: 3\n  window: 4", "line 3: window is given twice"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=helpers.message(message)) as seen:
        TitansConfig.load(path)
    assert str(path) in str(seen.value)


def test_wrong_settings_by_name():
    with pytest.raises(ValueError, match="unknown setting windo; the nearest is window"):
        TitansConfig.tiny(windo=3)
    with pytest.raises(ValueError, match="unknown preset smal; the nearest is small"):
        TitansConfig.preset("smal")
    with pytest.raises(ValueError, match="variant must be .*, got 'x'"):
        ModelConfig(variant="x")
    with pytest.raises(ValueError, match="ends in .yaml"):
        TitansConfig().save("run.toml")


@pytest.mark.parametrize("section", ["model", "data", "training", "report", "name"])
@pytest.mark.parametrize("kind", [TitansConfig, lambda **given: RunConfig(**{"model": ModelConfig()} | given)])
def test_sections_of_another_type(section, kind):
    with pytest.raises(ValueError, match=f"^{section} must be .+, got {'int' if section == 'data' else 'dict'}$"):
        kind(**{section: 3 if section == "data" else {"lr": 0.1}})


def test_every_setting_has_help_and_a_name_of_its_own():
    assert all(f.metadata["help"] for _, f, _ in settings_of(TitansConfig()).values())


def test_the_paper_s_settings():
    for name, tokens in {"small": 15e9, "medium": 15e9, "large": 30e9}.items():
        config = TitansConfig.preset(name)
        assert config.model.vocab_size == 32_000
        training = config.training
        assert (training.seq_len, training.lr, training.weight_decay, training.optimizer) == (4096, 4e-4, 0.1, "adamw")
        step = training.seq_len * training.batch_size * training.grad_accum
        assert step == 2**19
        assert training.steps * step == pytest.approx(tokens, rel=1e-4)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_presets_take_a_variant(name, variant):
    config = TitansConfig.preset(name, variant=variant, steps=7)
    assert (config.model.variant, config.training.steps) == (variant, 7)


@pytest.mark.parametrize("name", ["default", "mac", "mag", "mal", "lmm", "baseline"])
def test_committed_files(name):
    """Each has the sections that a reader looks for, and names every setting of its model that is not the default."""
    import yaml

    text = (CONFIGS / f"{name}.yaml").read_text()
    assert {"model", "data", "training"} <= set(yaml.safe_load(text))
    config = TitansConfig.from_yaml(text)
    assert config.model.variant == (name if name != "default" else "mac")
    assert {f.name for f in fields(ModelConfig)} >= set(yaml.safe_load(text)["model"])


@pytest.mark.parametrize(("name", "millions"), [("tiny", 0.21), ("small", 175), ("medium", 344), ("large", 755)])
def test_parameters_of_presets(name, millions):
    """Of the same size in every variant; counted without allocating anything."""
    for variant in VARIANTS:
        model = build_model(TitansConfig.preset(name, variant=variant), "meta")
        assert all(p.is_meta for p in model.parameters())
        count = sum(p.numel() for p in model.parameters())
        assert count == pytest.approx(millions * 1e6, rel=0.02), variant


def test_committed_files_are_of_one_size():
    names = ["mac", "mag", "mal", "lmm", "baseline"]
    models = [build_model(TitansConfig.load(CONFIGS / f"{name}.yaml"), "meta") for name in names]
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert max(counts) < 1.02 * min(counts), dict(zip(names, counts, strict=True))
