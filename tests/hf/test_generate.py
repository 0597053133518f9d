"""generate() on the state that does not grow, from a saved and reloaded model."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from titans_pytorch.hf import TitansForCausalLM, TitansHFConfig
from titans_pytorch.models.config import VARIANTS

from .. import helpers
from ..helpers import randomise
from .tiny import IDS, tiny

MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3, "min_p": 0.05, "num_return_sequences": 2},
    "beam": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_generate_with_cache_and_from_a_saved_model(variant, tmp_path):
    model = randomise(tiny(variant, tie_embeddings=variant == "mag"), scale=0.3)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is TitansForCausalLM
    assert again.config.to_model() == model.config.to_model() == AutoConfig.from_pretrained(tmp_path).to_model()
    for mode, options in MODES.items():
        written = []
        for one, use_cache in ((model, False), (model, True), (again, True)):
            torch.manual_seed(2)
            written.append(one.generate(IDS, max_new_tokens=8, use_cache=use_cache, **options))
        assert written[0].shape == (2 * options.get("num_return_sequences", 1), 15)
        assert written[0].equal(written[1]), mode
        assert written[0].equal(written[2]), mode


def test_beams_are_reordered(monkeypatch):
    """The comparison above sees a state whose rows stay where they were."""
    from titans_pytorch.hf import TitansCache

    model = randomise(tiny(), scale=0.3)
    options = {"max_new_tokens": 12, "num_beams": 4}
    wanted = model.generate(IDS, use_cache=False, **options)
    monkeypatch.setattr(TitansCache, "reorder_cache", lambda self, index: None)
    assert not model.generate(IDS, use_cache=True, **options).equal(wanted)


def test_reads_each_token_once(monkeypatch):
    """The prompt, then one token at a time; and a stream goes on from a cache of one's own."""
    model, lengths = tiny("mag"), []
    run = model.model.run
    monkeypatch.setattr(model.model, "run", lambda x, states: lengths.append(x.shape[1]) or run(x, states))
    with torch.no_grad():
        whole = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert lengths == [7, 1, 1, 1]
    with torch.no_grad():
        cache = model(IDS[:, :5], use_cache=True).past_key_values
        assert cache.get_seq_length() == 5
        again = model.generate(IDS, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert lengths[4:] == [5, 2, 1, 1, 1]
    assert again.equal(whole)


def test_rows_of_a_cache():
    model = tiny("mac")
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        out = model(IDS[[0, 0, 1, 1], :2], past_key_values=cache).logits
        plain = model(torch.cat((IDS, IDS[:, :2]), dim=1)).logits[:, 7:]
    torch.testing.assert_close(out, plain[[0, 0, 1, 1]])


def test_forward():
    model = tiny("mal")
    with torch.no_grad():
        out = model(IDS, labels=IDS, use_cache=True)
        torch.testing.assert_close(out.loss, model.model(IDS, return_loss=True))
        torch.testing.assert_close(out.logits, model.model(IDS))
        torch.testing.assert_close(model(IDS, logits_to_keep=1).logits, out.logits[:, -1:])
        torch.testing.assert_close(model(IDS, logits_to_keep=torch.tensor([1, 3])).logits, out.logits[:, [1, 3]])
        assert model(IDS, labels=IDS).past_key_values is None
        loss, logits = model(IDS, labels=IDS, return_dict=False)
        assert logits.equal(out.logits)
        embedded = model(inputs_embeds=model.get_input_embeddings()(IDS)).logits
        torch.testing.assert_close(embedded, out.logits)


def test_half_precision(tmp_path):
    tiny().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    logits = model(IDS).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    torch.testing.assert_close(logits.float(), tiny()(IDS).logits, atol=0.05, rtol=0.05)


def test_padding():
    """Behind a row it changes nothing, elsewhere it is refused."""
    model, mask = tiny(), torch.ones(2, 7)
    mask[1, 5:] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    loss = model(IDS, attention_mask=mask, labels=labels).loss
    other = (IDS + (mask == 0)) % 20
    torch.testing.assert_close(model(other, attention_mask=mask, labels=labels).loss, loss)
    with pytest.raises(ValueError, match="attention_mask must be prompts of one length.*, got padding"):
        model.generate(IDS, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(ValueError, match="attention_mask must be .*, got padding before a row's tokens"):
        model(IDS, attention_mask=mask.flip(1), labels=labels)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tiny()(IDS, past_key_values=((),)), "past_key_values must be ..., got tuple"),
        (lambda: tiny()(), "input_ids or inputs_embeds must be ..., got neither"),
        (lambda: tiny(d_model=10, n_heads=3), "n_heads must be ..., got 3"),
        (lambda: TitansHFConfig.of({"variant": "mac"}), "config must be ..., got dict"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=helpers.message(message)):
        call()


def test_names_that_transformers_uses():
    config = TitansHFConfig(hidden_size=32, num_hidden_layers=3, tie_word_embeddings=True)
    assert (config.d_model, config.n_layers, config.tie_embeddings) == (32, 3, True)
    assert config.hidden_size == 32
