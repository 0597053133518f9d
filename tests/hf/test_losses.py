"""What Trainer makes of the losses: label smoothing, accumulation, padding."""

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from titans_pytorch.hf import TitansForCausalLM, TitansHFConfig

from .tiny import IDS, SETTINGS, tiny


class Mine(TitansForCausalLM):
    """A user's own."""


def trainer(model, folder, **arguments):
    given = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 2} | arguments
    return Trainer(model=model, args=TrainingArguments(output_dir=str(folder), **given))


@pytest.mark.parametrize("kind", [TitansForCausalLM, Mine])
def test_label_smoothing_shifts_labels(kind, tmp_path):
    torch.manual_seed(0)
    model = kind(TitansHFConfig(**SETTINGS)).train()
    labels = IDS.clone()
    labels[1, 4:] = -100
    smoothing = trainer(model, tmp_path, label_smoothing_factor=0.1)
    loss = smoothing.compute_loss(model, {"input_ids": IDS, "labels": labels})
    logits = model(IDS).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=0.1))


def test_the_memory_loss_needs_labels(tmp_path):
    model = tiny(memory_loss_weight=0.5).train()
    smoothing = trainer(model, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="memory_loss_weight needs labels"):
        smoothing.compute_loss(model, {"input_ids": IDS, "labels": IDS}, num_items_in_batch=torch.tensor(12))


SOURCES = [{}, {"surprise_source": "prediction"}, {"surprise_threshold": 0.03}]


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_both_losses_add_up_over_micro_batches(source):
    """Given the number of labels of all, uneven micro-batches sum to the loss and the gradient of one batch."""
    model = tiny(memory_loss_weight=1.0, **source).train()
    ids = torch.randint(0, 20, (5, 9), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[0, 3:], labels[3, :5] = -100, -100
    n = (labels[:, 1:] != -100).sum()
    whole = model(ids, labels=labels)
    parts = [slice(0, 1), slice(1, 3), slice(3, 5)]
    summed = sum(model(ids[p], labels=labels[p], num_items_in_batch=n).loss for p in parts)
    torch.testing.assert_close(summed, whole.loss)
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=int(n)).loss, whole.loss)
    torch.testing.assert_close(gradient(model, summed), gradient(model, whole.loss), atol=1e-6, rtol=1e-4)
    plain = model.eval()(ids, labels=labels).loss
    assert whole.loss > plain + 0.01


def test_trainer_accumulates_to_the_same_weights(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 20, (8, 9))]
    trained = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = tiny(memory_loss_weight=1.0)
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        fitting = trainer(model, tmp_path, optim="sgd", learning_rate=0.5, max_grad_norm=0.0, **arguments)
        fitting.train_dataset = rows
        fitting.train()
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(trained[0], trained[1], atol=1e-5, rtol=1e-4)
    assert not trained[0].allclose(torch.cat([p.detach().flatten() for p in tiny().parameters()]), atol=1e-3)


@pytest.mark.parametrize("source", SOURCES[:2], ids=str)
def test_what_has_no_label_is_in_neither_loss(source):
    """Padding by a mask, by labels alone, and by a mask with labels at padding."""
    model = tiny(memory_loss_weight=1.0, **source).train()
    ids = IDS[:1, :4]
    wanted = model(ids, labels=ids).loss
    torch.testing.assert_close(model.model(ids, return_loss=True), wanted)
    keep = torch.arange(11)[None] < 4
    for pad in (0, 7):
        padded = torch.cat((ids, torch.full((1, 7), pad)), dim=1)
        hidden = padded.masked_fill(~keep, -100)
        for given in ({"labels": hidden}, {"attention_mask": keep.long()}, {"attention_mask": keep}):
            torch.testing.assert_close(model(padded, **{"labels": padded} | given).loss, wanted)
        left = {"attention_mask": keep.flip(1).long(), "labels": torch.cat((padded[:, 4:], ids), dim=1)}
        torch.testing.assert_close(model(left["labels"], **left).loss, wanted)


def test_labels_that_are_shifted_or_ignored_otherwise():
    model = tiny(memory_loss_weight=0.5).train()
    wanted = model(IDS, labels=IDS).loss
    shifted = F.pad(IDS[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(IDS, labels=IDS, shift_labels=shifted).loss, wanted)
    torch.testing.assert_close(model(IDS, shift_labels=shifted).loss, wanted)
    torch.testing.assert_close(model(IDS, labels=IDS, num_items_in_batch=24).loss, wanted / 2)
    labels = IDS.masked_fill(IDS == 3, -100)
    torch.testing.assert_close(model(IDS, labels=IDS, ignore_index=3).loss, model(IDS, labels=labels).loss)


def test_trainer_evaluates_padded_rows(tmp_path):
    """Predictions too: the cache is none of them."""
    model, rows = tiny(), []
    for row, n in zip(IDS, (7, 4), strict=True):
        mask = torch.arange(7) < n
        rows.append({"input_ids": row, "attention_mask": mask, "labels": row.masked_fill(~mask, -100)})
    predicting = trainer(model, tmp_path)
    found = predicting.predict(rows)
    items = 9 if hasattr(predicting, "_loss_shifts_labels") else 11  # older versions count first labels, too
    assert found.predictions.shape == (2, 7, 20)
    alone = [model(IDS[i : i + 1, :n], labels=IDS[i : i + 1, :n]).loss.item() * (n - 1) for i, n in ((0, 7), (1, 4))]
    assert found.metrics["test_loss"] == pytest.approx(sum(alone) / items, rel=1e-5)
    unlabelled = trainer(model, tmp_path).predict([{k: v for k, v in row.items() if k != "labels"} for row in rows])
    torch.testing.assert_close(torch.tensor(unlabelled.predictions), torch.tensor(found.predictions))
