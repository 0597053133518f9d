"""generate() on the state that does not grow, from a saved and reloaded model."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from titans_pytorch import NeuralMemory
from titans_pytorch.hf import TitansForCausalLM, TitansHFConfig
from titans_pytorch.models.config import VARIANTS

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
    monkeypatch.setattr(model.model, "run", lambda x, *rest: lengths.append(x.shape[1]) or run(x, *rest))
    with torch.no_grad():
        whole = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert lengths == [7, 1, 1, 1]
    with torch.no_grad():
        cache = model(IDS[:, :5], use_cache=True).past_key_values
        assert cache.get_seq_length() == 5
        again = model.generate(IDS, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert lengths[4:] == [5, 2, 1, 1, 1]
    assert again.equal(whole)


def test_tokens_are_read_by_steps(monkeypatch):
    model, forward, lengths = tiny("mac"), NeuralMemory.forward, []

    def noted(self, seq, *args, **kwargs):
        lengths.append(seq.shape[1])
        return forward(self, seq, *args, **kwargs)

    monkeypatch.setattr(NeuralMemory, "forward", noted)
    model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert lengths == [4, 3, 4, 3]  # the prompt's segments, of both blocks
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        wanted = model(IDS[:, :1], past_key_values=cache, output_hidden_states=True).logits
        torch.testing.assert_close(model(IDS[:, :1], past_key_values=cache).logits, wanted)


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


def test_both_names_of_the_cache():
    """transformers' versions call it past_key_values or cache, in arguments and in outputs."""
    model = tiny("mag")
    with torch.no_grad():
        first = model(IDS[:, :4])
        cache = first.cache
        assert first.past_key_values is first["past_key_values"] is cache
        wanted = model(IDS).logits[:, 4:]
        for given in ({"cache": cache}, {"past_key_values": cache}, {"cache": copy.deepcopy(cache)}):
            torch.testing.assert_close(model(IDS[:, 4:], **given).logits, wanted)
        torch.testing.assert_close(model(IDS[:, 4:], None, cache).logits, wanted)
    with pytest.raises(ValueError, match="past_key_values cannot be combined with cache"):
        model(IDS, cache=cache, past_key_values=cache)


def test_a_copied_cache_may_hang_on_a_graph():
    model = tiny("mac")
    cache = copy.deepcopy(model(IDS, use_cache=True).past_key_values)
    model(IDS, past_key_values=cache).logits.sum().backward()
    assert (model.model.token_emb.weight.grad != 0).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_generate_from_embeddings_and_from_a_prefix(variant):
    model = randomise(tiny(variant), scale=0.3)
    options = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        wanted = model.generate(IDS, use_cache=False, **options)
        for use_cache in (True, False):
            embedded = model.get_input_embeddings()(IDS)
            got = model.generate(inputs_embeds=embedded, use_cache=use_cache, **options)
            assert got.equal(wanted[:, 7:])
        cache = model(IDS[:, :3], use_cache=True).past_key_values
        for _ in range(2):  # the cache given is left as it was
            assert model.generate(IDS, past_key_values=copy.deepcopy(cache), **options).equal(wanted)
            out = model.generate(IDS, past_key_values=cache, return_dict_in_generate=True, **options)
            assert out.sequences.equal(wanted)
        assert out.past_key_values.get_seq_length() == 11
        longer = torch.cat((wanted, IDS), dim=1)  # a further turn
        turn = model.generate(longer, past_key_values=out.past_key_values, **options)
        assert turn.equal(model.generate(longer, use_cache=False, **options))


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states(variant):
    model = tiny(variant)
    out = model(IDS, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.n_layers + 1
    assert out.hidden_states[0].equal(model.model.token_emb(IDS))
    assert model.model.to_logits(out.hidden_states[-1]).equal(out.logits)
    if variant != "baseline":
        after, _, _ = model.model.blocks[0](out.hidden_states[0])
        assert out.hidden_states[1].equal(after)
    assert model(IDS).hidden_states is None
    written = model.generate(
        IDS, max_new_tokens=3, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
    )
    assert [len(step) for step in written.hidden_states] == [model.config.n_layers + 1] * 3
    torch.testing.assert_close(written.hidden_states[0][1], out.hidden_states[1])
    model.config.output_hidden_states = True
    logits, cache, hidden = model(IDS, return_dict=False)
    assert hidden[1].equal(out.hidden_states[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: tiny()(IDS, past_key_values=DynamicCache()),
            "past_key_values must be the TitansCache .* DynamicCache",
        ),
        (lambda: tiny()(IDS[0]), "input_ids must be"),
        (lambda: tiny()(IDS + 20), "input_ids must be"),
        (lambda: tiny()(inputs_embeds=torch.ones(2, 7, 3)), r"inputs_embeds must be embedded tokens \[b n 16\]"),
        (lambda: tiny()(IDS, labels=IDS[:, 1:]), r"labels must be of shape \[b n\] = \(2, 7\), got \(2, 6\)"),
        (lambda: tiny()(IDS, labels=IDS, logits_to_keep=1), "logits_to_keep cannot be combined with labels"),
        (lambda: tiny()(IDS, logits_to_keep=-1), "logits_to_keep must be at least 0"),
        (lambda: tiny()(IDS, output_attentions=True), "output_attentions must be False"),
        (lambda: tiny().generate(IDS, cache_implementation="static", max_new_tokens=2), "cache_implementation must be"),
        (lambda: tiny().generate(IDS, prompt_lookup_num_tokens=2, max_new_tokens=2), "assisted generation"),
        (lambda: tiny().generate(IDS, assistant_model=tiny(), max_new_tokens=2), "assisted generation"),
        (lambda: tiny().generate(IDS, windw=2, max_new_tokens=2), "windw"),
        (lambda: tiny()(IDS).cache.crop(3), r"crop\(3\) cannot be combined with a TitansCache"),
        (lambda: TitansHFConfig(windows=4), "unknown setting windows; the nearest is window"),
        (lambda: tiny()(IDS, past_key_values=((),)), "past_key_values must be .* got tuple"),
        (lambda: tiny()(), "input_ids or inputs_embeds must be one of them, got neither"),
        (lambda: tiny(d_model=10, n_heads=3), "n_heads must be .* got 3"),
        (lambda: TitansHFConfig.of({"variant": "mac"}), "config must be .* got dict"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["token_type_ids", "head_mask", "past_key_value", "anything"])
def test_unknown_keywords(name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        tiny()(IDS, **{name: None})


def test_names_that_transformers_uses():
    config = TitansHFConfig(hidden_size=32, num_hidden_layers=3, tie_word_embeddings=True)
    assert (config.d_model, config.n_layers, config.tie_embeddings) == (32, 3, True)
    assert config.hidden_size == 32
