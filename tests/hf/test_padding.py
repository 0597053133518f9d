"""Padded and packed batches give what each text gives alone."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from titans_pytorch.hf import TitansCache
from titans_pytorch.models.config import VARIANTS

from ..helpers import randomise
from .tiny import IDS, tiny

MASKS = {
    "right": [[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]],
    "left": [[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 1, 0, 0, 1], [0, 1, 0, 1, 1, 1, 0]],
    "an empty row": [[0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 1]],
}


def close(got, wanted):
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-4)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_hides_padding(kind, variant):
    """Logits, hidden states, loss and gradients are those of the tokens alone, whatever stands at padding."""
    model = randomise(tiny(variant, memory_loss_weight=0.3 * (variant != "baseline")), scale=0.3).train()
    mask = torch.tensor(MASKS[kind])
    rows = [ids[keep] for ids, keep in zip(IDS, mask.bool(), strict=True) if keep.any()]
    alone = [model(row[None], labels=row[None], output_hidden_states=True) for row in rows]
    counts = torch.tensor([len(row) - 1 for row in rows])
    wanted = sum(out.loss * n for out, n in zip(alone, counts, strict=True)) / counts.sum()
    found = []
    for ids in (IDS, (IDS + (mask == 0)) % 20):
        out = model(ids, attention_mask=mask, labels=ids, output_hidden_states=True)
        for b, row in enumerate(i for i in range(2) if mask[i].any()):
            close(out.logits[row, mask[row].bool()], alone[b].logits[0])
            for layer, hidden in enumerate(out.hidden_states):
                close(hidden[row, mask[row].bool()], alone[b].hidden_states[layer][0])
        assert (out.logits[mask == 0] == 0).all()
        close(out.loss, wanted)
        found.append(gradients(model, out.loss))
    assert found[0].equal(found[1])
    close(found[0], gradients(model, wanted))


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_packed_by_the_collator(variant):
    model = randomise(tiny(variant, memory_loss_weight=0.3 * (variant != "baseline")), scale=0.3).train()
    rows = [IDS[0, :6], IDS[1, :1], IDS[1, 2:]]
    counts = torch.tensor([len(row) - 1 for row in rows])
    alone = [model(row[None], labels=row[None]) for row in (rows[0], rows[2])]
    wanted = sum(out.loss * n for out, n in zip(alone, (counts[0], counts[2]), strict=True)) / counts.sum()
    options = {"return_flash_attn_kwargs": True, "return_seq_idx": True}
    batch = DataCollatorWithFlattening(**options)([{"input_ids": row.tolist()} for row in rows])
    told = ("position_ids", "seq_idx", "cu_seq_lens_q")
    for names in (told, *((name,) for name in told)):
        given = {
            name: value for name, value in batch.items() if name in (*names, "input_ids", "labels", "max_length_q")
        }
        out = model(**given)
        close(out.loss, wanted)
        close(out.logits[0, 7:], alone[1].logits[0])
        close(gradients(model, out.loss), gradients(model, sum(alone_loss(model, r) for r in rows) / counts.sum()))
    assert model.eval()(**batch).past_key_values is None
    # labels that are not -100 where a text begins: its first token is nobody's prediction
    close(model.train()(**batch | {"labels": batch["input_ids"]}).loss, wanted)


def alone_loss(model, row):
    return model(row[None], labels=row[None]).loss * (len(row) - 1) if len(row) > 1 else 0.0


def test_packed_rows_with_padding():
    model = tiny("mag")
    ids = torch.stack((torch.cat((IDS[0, :3], IDS[1, :4])), torch.cat((IDS[1, :2], IDS[0, :5]))))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4]])
    mask = torch.ones(2, 7)
    mask[0, 5:] = 0
    out = model(ids, position_ids=positions, attention_mask=mask).logits
    close(out[0, :3], model(ids[:1, :3]).logits[0])
    close(out[0, 3:5], model(ids[:1, 3:5]).logits[0])
    close(out[1, 2:], model(ids[1:, 2:]).logits[0])
    assert (out[0, 5:] == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mask_in_a_continuation(variant):
    """It covers what was read and what is new; padding is read in neither."""
    model = randomise(tiny(variant), scale=0.3)
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0], [1, 1, 0, 1, 0, 1, 1]])[:, :6]
    rows = torch.stack([ids[:6][keep] for ids, keep in zip(IDS, mask.bool(), strict=True)])
    wanted = model(rows).logits[:, -2:]
    with torch.no_grad():
        first = model(IDS[:, :3], attention_mask=mask[:, :3], use_cache=True)
        cache = first.past_key_values
        assert (cache.get_seq_length(), cache.tokens) == (3, 2)
        out = model(IDS[:, 3:6], attention_mask=mask, past_key_values=cache)
    close(out.logits[0, [1, 2]], wanted[0])
    close(out.logits[1, [0, 2]], wanted[1])
    assert (out.cache.positions, out.cache.tokens) == (6, 4)
    compact = torch.tensor([[9, 2, 3], [2, 9, 3]])
    for positions in (compact, torch.tensor([[3, 4, 5]])):
        again = model(IDS[:, 3:6], attention_mask=mask, cache=cache, position_ids=positions)
        assert again.logits.equal(out.logits)


@pytest.mark.parametrize("variant", ["mac", "baseline"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_generate_from_padded_prompts(variant, options):
    """Prompts of one length keep the cache, others do without."""
    model = randomise(tiny(variant), scale=0.3)
    options |= {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(IDS[:, 3:], **options)[:, 4:]
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[:, :3] = 0
    for use_cache in (True, False):
        got = model.generate(IDS, attention_mask=mask, use_cache=use_cache, **options)[:, 7:]
        assert got.equal(wanted)
    mask[1, 3] = 0
    short = model.generate(IDS[1:, 4:], **options)[:, 3:]
    got = model.generate(IDS, attention_mask=mask, use_cache=False, **options)[:, 7:]
    assert got.equal(torch.cat((wanted[:1], short)))
    with pytest.raises(ValueError, match="use_cache=True needs rows with equally many tokens"):
        model.generate(IDS, attention_mask=mask, **options)


def test_evaluation_of_padded_rows_needs_no_setting():
    model, mask = tiny(), torch.ones(2, 7)
    mask[1, 5:] = 0
    assert model(IDS, attention_mask=mask).past_key_values is None
    mask[0, 5:] = 0
    assert model(IDS, attention_mask=mask).past_key_values.tokens == 5


PAST = {"past": IDS[:, :3]}
BOTH = torch.ones(2, 7)
REFUSED = [
    ({"attention_mask": torch.ones(2, 1, 7, 7)}, r"attention_mask must be .*\(2, 7\), got \(2, 1, 7, 7\)"),
    ({"attention_mask": torch.ones(2, 6)}, "attention_mask must be"),
    ({"attention_mask": {"full_attention": BOTH}}, "attention_mask must be .* got dict"),
    ({"attention_mask": BOTH * 2}, "attention_mask must be 1 for tokens and 0 for padding"),
    ({"attention_mask": torch.zeros(2, 7)}, "attention_mask must be 1 for a token or more"),
    ({"attention_mask": torch.ones(2, 7), **PAST}, r"attention_mask must be .*\(2, 10\)"),
    ({"attention_mask": torch.ones(2, 10).index_fill(1, torch.tensor([0]), 0), **PAST}, "each of the 3 tokens"),
    ({"attention_mask": torch.ones(2, 10).tril(8), **PAST}, "a cache needs rows with equally many tokens"),
    ({"position_ids": torch.arange(1, 8)[None]}, "position_ids must be 0, 1, 2"),
    ({"position_ids": torch.tensor([[0, 1, 2, 4, 5, 6, 7]])}, "position_ids must be 0, 1, 2"),
    (
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), **PAST},
        "position_ids must be 3, 4, ... behind the cache",
    ),
    ({"position_ids": torch.arange(7)[None], **PAST}, "position_ids must be 3, 4, ... behind the cache"),
    ({"position_ids": torch.arange(7)}, r"position_ids must be integers of shape \(2, 7\)"),
    ({"position_ids": torch.arange(7.0)[None]}, "position_ids must be integers"),
    ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), "use_cache": True}, "use_cache=True needs rows"),
    ({"seq_idx": torch.zeros(7).long()}, "seq_idx must be integers of shape"),
    (
        {"seq_idx": torch.tensor([[0] * 4 + [1] * 3] * 2), **PAST},
        "seq_idx of several texts in a row cannot be combined",
    ),
    ({"cu_seq_lens_q": torch.tensor([0, 3, 7])}, "cu_seq_lens_q must be growing integers from 0 to b"),
    ({"cu_seq_lens_q": torch.tensor([0, 9, 14])}, "cu_seq_lens_q must be a bound at each row's begin"),
    ({"cu_seq_lens_k": torch.tensor([0, 7, 14]), "attention_mask": BOTH.triu()}, "cu_seq_lens_k cannot be combined"),
    ({"cu_seq_lens_q": torch.tensor([0, 3, 7, 14]), "position_ids": torch.arange(7)[None]}, "cu_seq_lens_q cannot be"),
    ({"max_length_q": 6}, "max_length_q must be at least the tokens of the longest text, 7, got 6"),
    ({"cache_position": torch.arange(1, 8)}, "cache_position must be the positions from 0 to 6"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_is_not_honoured_is_refused(given, message):
    model = tiny("mag")
    given = dict(given)
    if "past" in given:
        given["past_key_values"] = model(given.pop("past"), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=message):
        model(IDS, **given)


def test_an_empty_cache_is_none():
    model = tiny()
    out = model(IDS, past_key_values=TitansCache(), use_cache=True)
    assert out.logits.equal(model(IDS).logits)
    assert out.past_key_values.get_seq_length() == 7
