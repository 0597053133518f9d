"""Update rules by name behind transformers: configurations, generate, padded and packed rows."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorWithFlattening

from titans_pytorch import ModelConfig
from titans_pytorch.hf import TitansForCausalLM, TitansHFConfig
from titans_pytorch.models.rule_settings import RULES

from ..helpers import message, randomise
from .test_generate import MODES
from .test_padding import MASKS, close
from .tiny import IDS, SETTINGS, tiny

PLAIN = {name: value for name, value in SETTINGS.items() if name != "chunk_size"}
SOME = ["gated_deltanet", "atlas", "lact"]  # solved, chunk by chunk, with chunks of several tokens


def ruled(rule, variant, **settings):
    chunk = {} if RULES[rule].chunk is None else {"chunk_size": 3}
    torch.manual_seed(0)
    config = TitansHFConfig(variant=variant, rule=rule, **PLAIN | {"n_layers": 1} | chunk | settings)
    return randomise(TitansForCausalLM(config), scale=0.3).eval()


@pytest.mark.parametrize("rule", RULES)
def test_configurations_are_read_back(rule, tmp_path):
    config = TitansHFConfig.of(ModelConfig(rule=rule))
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_model() == ModelConfig(rule=rule) == config.to_model()


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"rule": "delta_net"}, "rule must be one of ..., got 'delta_net'; the nearest is deltanet"),
        ({"rule": "deltanet"}, "chunk_size 4 cannot be combined with rule deltanet, which writes token by token"),
        ({"rule": "lact", "memory_loss_weight": 0.1}, "memory_loss_weight 0.1 cannot be combined with rule lact"),
    ],
)
def test_mistakes(settings, found):
    with pytest.raises(ValueError, match=message(found)):
        tiny(**settings)


@pytest.mark.parametrize(("rule", "variant"), [("gated_deltanet", "mag"), ("atlas", "mac"), ("lact", "mal")])
def test_generate_with_cache_and_from_a_saved_model(rule, variant, tmp_path):
    model = ruled(rule, variant)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.rule == rule
    for mode, options in MODES.items():
        written = []
        for one, use_cache in ((model, False), (model, True), (again, True)):
            torch.manual_seed(2)
            written.append(one.generate(IDS, max_new_tokens=8, use_cache=use_cache, **options))
        assert written[0].equal(written[1]), mode
        assert written[0].equal(written[2]), mode


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm"])
@pytest.mark.parametrize("rule", SOME)
def test_rows_of_different_lengths(rule, variant):
    """Padded and packed rows give what each row gives alone."""
    model = ruled(rule, variant).double()
    with torch.no_grad():
        for kind in ("left", "right", "holes"):
            mask = torch.tensor(MASKS[kind])
            logits = model(IDS, attention_mask=mask).logits
            for row, ids, real in zip(logits, IDS, mask.bool(), strict=True):
                close(row[real], model(ids[real][None]).logits[0])
        rows = [IDS[0, :6], IDS[1, 2:]]
        batch = DataCollatorWithFlattening()([{"input_ids": row.tolist()} for row in rows])
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
        close(packed, torch.cat([model(row[None]).logits[0] for row in rows]))


@pytest.mark.parametrize("rule", SOME)
def test_training_with_checkpoints_of_activations(rule):
    model, losses = ruled(rule, "mac").double().train(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        losses.append((loss.detach(), model.model.blocks[0].layer.remember.memory.projections.to_keys.weight.grad))
    close(losses[0][0], losses[1][0])
    close(losses[0][1], losses[1][1])
    assert (losses[0][1] != 0).any()
