"""`ModelConfig.rule`: the memory of a named rule, with the model's settings or a refusal."""

import dataclasses
import logging
import re
import typing
from pathlib import Path

import pytest
import torch

from titans_pytorch import ModelConfig, NeuralMemory, TitansConfig, build_model
from titans_pytorch.memory.named.registry import NAMED
from titans_pytorch.models.family import memory_of
from titans_pytorch.models.rule_settings import RULES, TITANS_STEP, Rule, unfit
from titans_pytorch.training.config import from_dict

from ..helpers import message, randomise, refusal

D, HEADS = 8, 2
each_rule = pytest.mark.parametrize("rule", RULES)

# another value than the default of every setting that concerns a memory
OTHERS = {
    "mem_layers": 3,
    "d_hidden": 5,
    "chunk_size": 2,
    "use_momentum": False,
    "use_decay": False,
    "max_step": 0.7,
    "surprise_threshold": 1e9,
    "surprise_source": "prediction",
    "conv_kernel": 2,
    "qk_norm": "rms",
    "mem_norm": True,
    "mem_init": "orthogonal",
    "mem_init_scale": 2.0,
    "init_step_bias": 1.5,
    "init_momentum_bias": 1.5,
    "init_decay_bias": -1.0,
}


def config_of(rule, **settings):
    return ModelConfig(rule=rule, d_model=D, n_heads=2, mem_heads=HEADS, **settings)


def outputs(memory):
    n = 9 if memory.store_chunk_size == 1 else 140  # two chunks of lact
    seq = torch.randn(2, n, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return randomise(memory.double(), scale=0.3)(seq)[0].detach()


def made(rule, **settings):
    torch.manual_seed(0)
    return memory_of(config_of(rule, **settings))


def test_names():
    """Rules of models are presets, `exact`, or `titans`."""
    assert set(typing.get_args(Rule)) == {*RULES, "titans"}
    assert {*RULES} - {"exact"} <= {*NAMED}
    assert len(RULES) >= 12


@each_rule
def test_the_memory_is_the_presets(rule):
    own = {"heads": HEADS, "qkv_conv_kernel": 4, "qk_l2norm": True}
    own |= {"init_decay_bias": -6.0} if RULES[rule].gate else {}
    own |= {} if RULES[rule].chunk is None else {RULES[rule].chunk: 64}
    own["dim_head"] = D // HEADS
    torch.manual_seed(0)
    wanted = NeuralMemory.exact(D, **own) if rule == "exact" else NeuralMemory.preset(rule, D, **own)
    memory = made(rule)
    assert {n: p.shape for n, p in memory.named_parameters()} == {n: p.shape for n, p in wanted.named_parameters()}
    assert type(memory.engine) is type(wanted.engine)
    assert memory.chunk_config == wanted.chunk_config
    assert memory.tokenwise
    wanted.load_state_dict(memory.state_dict())
    assert torch.equal(outputs(memory), outputs(wanted))


@each_rule
@pytest.mark.parametrize("name", OTHERS)
def test_a_setting_changes_the_memory_or_is_refused(rule, name):
    """Nothing is swallowed. A switch of what a rule does not have is off already."""
    if name in dict(unfit(rule, ModelConfig(**{name: OTHERS[name]}))):
        with pytest.raises(ValueError, match=f"{name} {OTHERS[name]} cannot be combined with rule {rule}, which "):
            made(rule, **{name: OTHERS[name]})
        return
    changed = made(rule, **{name: OTHERS[name]})
    plain, takes = made(rule), RULES[rule]
    off_already = {"use_momentum": not takes.momentum, "use_decay": not takes.gate}.get(name, False)
    one, other = outputs(changed), outputs(plain)
    same_parameters = [p.shape for p in changed.parameters()] == [p.shape for p in plain.parameters()]
    assert off_already == (same_parameters and torch.equal(one, other))


@each_rule
def test_rates(rule):
    """A switch that is off stays off; max_step is the largest rate, or the largest share of an error."""
    takes = RULES[rule]
    memory = made(rule, use_decay=False, use_momentum=False)
    seq = torch.randn(1, 64, D)
    rates = memory.rates(seq, memory.store_chunk_size, False)
    assert (rates.retention == 1).all()
    assert rates.momentum is None or (rates.momentum < 1e-30).all()
    trained = {name for name, p in memory.named_parameters() if p.requires_grad}
    assert not any("to_decay_factor" in name or "to_momentum" in name for name in trained)
    if takes.step is not None:
        largest = made(rule, max_step=0.7).rates.step_transform(torch.tensor(1e3))
        assert largest == pytest.approx(0.7 * (D // HEADS / 2 if takes.step == "share" else 1))


@pytest.mark.parametrize("rule", [rule for rule in RULES if RULES[rule].step == "share"])
def test_a_share_is_at_most_the_whole(rule):
    with pytest.raises(ValueError, match=refusal("max_step")):
        config_of(rule, max_step=1.5)


def test_titans_without_a_step_has_its_own():
    for settings in ({}, {"max_step": TITANS_STEP}):
        assert made("titans", **settings).rates.step_transform.max_step == 0.1
    one, other = (build_model(config_of("titans", **s)) for s in ({}, {"max_step": 0.1}))
    assert one.configuration == other.configuration  # caches fit both
    assert one.configuration != build_model(config_of("titans", max_step=0.2)).configuration


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("delta_net", "rule must be one of ..., got 'delta_net'; the nearest is deltanet"),
        ("gated_delta", "rule must be one of ..., got 'gated_delta'; the nearest is gated_deltanet"),
        ("xyz", "rule must be one of titans, exact, ..., got 'xyz'"),
        (3, "rule must be one of titans, exact, ..., got 3"),
    ],
)
def test_unknown_names(name, found):
    for build in (
        lambda: ModelConfig(rule=name),
        lambda: TitansConfig(rule=name),
        lambda: TitansConfig.tiny().replace(rule=name),
        lambda: from_dict(TitansConfig(), {"model": {"rule": name}}),
    ):
        with pytest.raises(ValueError, match=message(found)):
            build()


def test_another_rule_in_place_of_one(caplog):
    """Settings without a place return to their defaults, unless they are given; nothing else changes."""
    base = TitansConfig.tiny(max_step=0.5, mem_layers=3, conv_kernel=2)
    with caplog.at_level(logging.WARNING):
        changed = base.replace(rule="deltanet")
    wanted = {"rule": "deltanet", "chunk_size": 64, "max_step": None, "mem_layers": 2}
    assert changed.model == dataclasses.replace(base.model, **wanted)
    assert [line.getMessage() for line in caplog.records] == [
        "rule deltanet: chunk_size 32 is not used: it writes token by token",
        "rule deltanet: mem_layers 3 is not used: it has a network of 1 layer(s)",
        "rule deltanet: max_step 0.5 is not used: it has its own",
    ]
    with pytest.raises(ValueError, match="chunk_size 16 cannot be combined with rule deltanet"):
        base.replace(rule="deltanet", chunk_size=16)
    assert base.replace(rule="deltanet", max_step=0.5).model.max_step == 0.5
    assert base.replace(rule="atlas").model == dataclasses.replace(base.model, rule="atlas", max_step=None)
    assert base.replace(rule="titans") == base


@each_rule
def test_saved_settings_are_read_back(rule, tmp_path):
    config = TitansConfig.tiny(rule=rule)
    for name in ("c.yaml", "c.json"):
        config.save(tmp_path / name)
        assert TitansConfig.load(tmp_path / name) == config


def test_least_parameters_are_the_least():
    for rule in ("titans", *RULES):
        for settings in ({}, {"mem_layers": 1}, {"d_hidden": 2}):
            try:
                config = config_of(rule, **settings)
            except ValueError:
                continue
            model = build_model(config, "meta")
            assert config.least_parameters() <= sum(p.numel() for p in model.parameters()), (rule, settings)


def test_parameters_of_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    told = {
        rule: float(millions)
        for names, millions in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([\d.]+) \|$", page, re.M)
        for rule in re.findall(r"\w+", names)
    }
    counted = {}
    for rule in ("titans", *RULES):
        model = build_model(TitansConfig.small(rule=rule), "meta")
        counted[rule] = round(sum(p.numel() for p in model.parameters()) / 1e6, 1)
    assert told == counted
