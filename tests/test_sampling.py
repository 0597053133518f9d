"""Filters, the draw itself, and the sampling loop with and without a cache."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_pytorch.decoding.sampling import gumbel_sample, min_p_filter, sample, top_k_filter, top_p_filter

from .helpers import refusal
from .mac_options import OPTIONS, TOKENS, build, draw_ids

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[None]


def kept(logits):
    return logits.isfinite()[0].tolist()


def test_min_p_keeps_what_is_close_to_the_likeliest():
    assert kept(min_p_filter(LOGITS, 0.29)) == [True, True, True, False]
    assert kept(min_p_filter(LOGITS, 0.31)) == [True, True, False, False]
    assert kept(min_p_filter(LOGITS)) == kept(min_p_filter(LOGITS, 0.1))
    assert kept(min_p_filter(LOGITS, 0.09)) == [True] * 4
    assert kept(min_p_filter(LOGITS, 1.0)) == [True, False, False, False]
    assert torch.equal(min_p_filter(LOGITS, 0.31)[:, :2], LOGITS[:, :2])


def test_top_k_keeps_k_even_among_equals():
    assert kept(top_k_filter(LOGITS, 3)) == [True, True, True, False]
    assert sum(kept(top_k_filter(torch.zeros(1, 5), 2))) == 2
    assert kept(top_k_filter(LOGITS, 9)) == [True] * 4


def test_top_p_keeps_the_fewest_that_reach_p():
    assert kept(top_p_filter(LOGITS, 0.79)) == [True, True, False, False]
    assert kept(top_p_filter(LOGITS, 0.81)) == [True, True, True, False]
    assert kept(top_p_filter(LOGITS.flip(-1), 0.79)) == [False, False, True, True]
    assert kept(top_p_filter(LOGITS, 1e-9)) == [True, False, False, False]
    assert kept(top_p_filter(LOGITS, 1.0)) == [True] * 4


def test_draws_follow_the_softmax_at_the_temperature():
    torch.manual_seed(0)
    logits = LOGITS.masked_fill(torch.tensor([[False, False, False, True]]), -torch.inf).expand(40_000, -1)
    for temperature in (0.5, 1.0, 2.0):
        share = gumbel_sample(logits, temperature).bincount(minlength=4) / len(logits)
        torch.testing.assert_close(share, (logits[0] / temperature).softmax(dim=-1), rtol=0, atol=0.01)
    assert gumbel_sample(logits.bfloat16(), 1.0).max() < 3


def test_temperature_zero_takes_the_likeliest():
    assert gumbel_sample(torch.randn(50, 7), 0).shape == (50,)
    assert gumbel_sample(LOGITS.flip(-1), 0).tolist() == [3]


@settings(max_examples=25, deadline=None)
@given(OPTIONS, st.integers(1, 3), st.integers(1, 25), st.integers(0, 99))
def test_cached_equals_uncached(options, batch, prompt_len, seed):
    model = build(options, seed)
    prompt = draw_ids(batch, prompt_len, seed)
    texts = []
    for use_cache in (False, True):
        torch.manual_seed(seed)
        texts.append(model.sample(prompt, prompt_len + 9, show_progress=False, use_cache=use_cache))
    assert torch.equal(*texts)
    assert texts[0].shape == (batch, 9)
    assert texts[0].max() < TOKENS


def test_greedy_text_is_the_argmax_of_the_logits():
    model = build({"depth": 2, "segment_len": 4, "num_longterm_mem_tokens": 1})
    prompt = draw_ids(2, 3)
    text = torch.cat((prompt, model.sample(prompt, 14, temperature=0.0, show_progress=False, use_cache=True)), dim=1)
    with torch.no_grad():
        assert torch.equal(model.eval()(text)[:, 2:-1].argmax(dim=-1), text[:, 3:])


def test_a_cached_step_embeds_one_token():
    model = build({"depth": 2, "segment_len": 4, "num_longterm_mem_tokens": 2})
    embedded, attended = [], []
    model.token_emb.register_forward_hook(lambda m, args, out: embedded.append(args[0].shape[1]))
    model.layers[0].attention.to_qkv.register_forward_hook(lambda m, args, out: attended.append(args[0].shape[1]))
    model.sample(draw_ids(1, 6), 16, show_progress=False, use_cache=True)
    assert embedded == [6] + [1] * 9
    # token 8 and token 12 begin a segment: two long-term tokens come before them
    assert attended == [8] + [1] * (9 + 2 + 2)


def test_rows_of_a_batch_are_sampled_apart():
    model = build({"depth": 2, "segment_len": 4})
    prompts = draw_ids(3, 7)
    together = model.sample(prompts, 15, temperature=0.0, show_progress=False)
    alone = [model.sample(prompt[None], 15, temperature=0.0, show_progress=False) for prompt in prompts]
    assert torch.equal(together, torch.cat(alone))


def test_filter_is_given_its_arguments():
    model = build({"depth": 1, "segment_len": 4, "neural_memory_layers": ()})
    filter_fn = mock.Mock(side_effect=top_k_filter)
    only = model.sample(draw_ids(1, 3), 8, filter_fn=filter_fn, filter_kwargs={"k": 1}, show_progress=False)
    assert filter_fn.call_args.kwargs == {"k": 1}
    assert torch.equal(only, model.sample(draw_ids(1, 3), 8, temperature=0.0, show_progress=False))
    assert model.sample(draw_ids(1, 3), 8, filter_fn=None, show_progress=False).shape == (1, 5)


@pytest.mark.parametrize("training", [False, True])
def test_training_mode_is_left_as_it_was(training):
    model = build({"depth": 1, "segment_len": 4, "neural_memory_layers": ()}).train(training)
    seen = []
    model.register_forward_hook(lambda m, args, out: seen.append(m.training))
    model.sample(draw_ids(1, 3), 5, show_progress=False)
    assert seen == [False, False]
    assert model.training is training
    with pytest.raises(RuntimeError, match="stop"):
        model.sample(draw_ids(1, 3), 5, filter_fn=mock.Mock(side_effect=RuntimeError("stop")), show_progress=False)
    assert model.training is training


def test_nothing_to_add():
    model = build({"depth": 1, "segment_len": 4, "neural_memory_layers": ()})
    assert model.sample(draw_ids(2, 5), 5, show_progress=False).shape == (2, 0)
    assert model.sample(draw_ids(2, 5), 3, show_progress=False).shape == (2, 0)


def test_prompt_is_not_changed_and_any_integer_dtype_serves():
    model = build({"depth": 1, "segment_len": 4, "neural_memory_layers": ()})
    prompt = draw_ids(1, 5)
    text = model.sample(prompt, 8, temperature=0.0, show_progress=False)
    assert torch.equal(prompt, draw_ids(1, 5))
    assert text.dtype == torch.int64
    assert torch.equal(model.sample(prompt.to(torch.uint8), 8, temperature=0.0, show_progress=False), text)


def test_progress_bar_only_if_asked(capsys):
    model = build({"depth": 1, "segment_len": 4, "neural_memory_layers": ()})
    model.sample(draw_ids(1, 3), 5, show_progress=False)
    assert capsys.readouterr().err == ""
    model.sample(draw_ids(1, 3), 5)
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), r"^prompt must be .*, got \(1, 0\)"),
        (torch.zeros(3, dtype=torch.long), r"^prompt must be .*, got \(3,\)"),
        (torch.zeros(1, 3), r"^prompt must be .*, got torch.float32"),
        (torch.full((1, 3), TOKENS), rf"^prompt must be ids from 0 to {TOKENS - 1}, got token id {TOKENS}"),
        (torch.tensor([[0, -1]]), r"^prompt must be .*, got token id -1"),
        ("text", r"^prompt must be .*, got str"),
    ],
)
def test_bad_prompts_are_named(prompt, message):
    model = build({"depth": 1, "segment_len": 4, "neural_memory_layers": ()})
    with pytest.raises(ValueError, match=message):
        model.sample(prompt, 8, show_progress=False)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda model: sample(model, draw_ids(1, 2), 0), "seq_len"),
        (lambda model: sample(model, draw_ids(1, 2), 4, temperature=-1), "temperature"),
        (lambda model: min_p_filter(LOGITS, 2), "min_p"),
        (lambda model: top_k_filter(LOGITS, 0), "k"),
        (lambda model: top_p_filter(LOGITS, 0), "p"),
        (lambda model: gumbel_sample(LOGITS, -1), "temperature"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=refusal(name)):
        call(build({"depth": 1, "segment_len": 4, "neural_memory_layers": ()}))
