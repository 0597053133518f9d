"""Language models of the family: what the laws do not say."""

import pytest
import torch

from titans_pytorch import ModelConfig, TitansConfig, TitansMAL, build_model
from titans_pytorch.memory.surprise import auxiliary_loss
from titans_pytorch.models.config import VARIANTS

from .. import helpers


def tiny(variant="mac", **settings):
    torch.manual_seed(0)
    settings = {"d_model": 16, "n_layers": 2, "n_heads": 2, "mem_heads": 2, "window": 4, "chunk_size": 4} | settings
    return build_model(ModelConfig(variant=variant, vocab_size=20, **settings))


IDS = torch.randint(0, 20, (2, 13), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients(variant):
    model = tiny(variant)
    loss = model(IDS, return_loss=True)
    wanted = torch.nn.functional.cross_entropy(model(IDS[:, :-1]).transpose(1, 2), IDS[:, 1:])
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing(variant):
    model = tiny(variant)
    grads = []
    for again in (False, True):
        model.gradient_checkpointing = again
        model.zero_grad()
        model(IDS, return_loss=True).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_learns(variant):
    """A sequence by heart, in some steps."""
    model = tiny(variant)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        losses.append(model(IDS, return_loss=True))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.85 * losses[0]


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm"])
def test_memory_loss_joins_in_training_alone(variant):
    model = tiny(variant, memory_loss_weight=0.5)
    plain = model.eval()(IDS, return_loss=True)
    trained = model.train()(IDS, return_loss=True)
    _, surprises = model(IDS[:, :-1], return_surprises=True)
    wanted = plain + 0.5 * sum(auxiliary_loss(of_one) for of_one in surprises) / 2
    torch.testing.assert_close(trained, wanted)


def test_tied_embeddings():
    model = tiny(tie_embeddings=True)
    assert model.to_logits.weight is model.token_emb.weight


def test_state_detached_and_counted():
    model = tiny("mag")
    _, cache = model(IDS, return_cache=True)
    detached = cache.detach()
    assert (detached.tokens, detached.batch) == (13, 2)
    assert cache.layers[0].attention.keys.requires_grad
    assert not detached.layers[0].attention.keys.requires_grad
    assert not any(w.requires_grad for w in detached.layers[0].memory.states[0].values())


def test_build_model():
    config = TitansConfig.tiny(variant="mal")
    assert type(build_model(config)) is type(build_model(config.model)) is TitansMAL
    assert next(build_model(config, "meta").parameters()).is_meta
    with pytest.raises(ValueError, match="config must be a TitansConfig.*, got dict"):
        build_model({"variant": "mac"})
    for absent in ("cuda:99", "xpu:99", "hpu", "xla", "vulkan", "nowhere", 99):
        with pytest.raises(ValueError, match=f"^device must be .*, got {absent!r}$"):
            build_model(config, absent)


def test_wrong_calls():
    model, other = tiny(), tiny("mag", n_layers=1)
    _, cache = model(IDS, return_cache=True)
    for call, message in [
        (lambda: model(IDS[0]), "ids must be ..., got"),
        (lambda: model(IDS + 20), "ids must be ..., got token id"),
        (lambda: model(IDS.float()), "ids must be ..., got"),
        (lambda: model(IDS[:, :1], return_loss=True), "return_loss=True needs at least two tokens"),
        (lambda: model(IDS, cache=3), "cache must be ..., got int"),
        (lambda: other(IDS, cache=cache), "cache.variant must be ..., got 'mac'"),
        (lambda: model(IDS[:1], cache=cache), "cache must be one of 1..., got one of 2 rows"),
    ]:
        with pytest.raises(ValueError, match=helpers.message(message)):
            call()
