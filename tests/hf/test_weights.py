"""Weights that are missing, resized, tied or kept elsewhere."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from titans_pytorch.hf import TitansForCausalLM, TitansHFConfig
from titans_pytorch.models.config import VARIANTS

from ..helpers import randomise
from .tiny import IDS, tiny


def save_without(model, folder, left_out):
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not left_out(name)}
    save_file(kept, file, metadata={"format": "pt"})


@pytest.mark.parametrize("variant", VARIANTS)
def test_missing_weights_are_those_of_a_new_model(variant, tmp_path):
    """All of them, with one seed: bit by bit. The settings include rules that a generic initialisation misses."""
    options = {"mem_init_scale": 3.0, "init_step_bias": -2.0, "init_decay_bias": -5.0}
    model = randomise(tiny(variant, **options), scale=0.3)
    save_without(model, tmp_path, lambda name: name != "model.norm.weight")
    junk = [torch.full((size,), float("nan")) for size in (16, 64, 256, 1024) for _ in range(100)]
    del junk
    torch.manual_seed(0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    new = tiny(variant, **options)
    assert loaded.model.norm.weight.equal(model.model.norm.weight)
    for (name, got), wanted in zip(loaded.named_parameters(), new.parameters(), strict=True):
        assert name == "model.norm.weight" or got.equal(wanted), name
        assert got.requires_grad == wanted.requires_grad, name
    for (name, got), wanted in zip(loaded.named_buffers(), new.buffers(), strict=True):
        assert got.equal(wanted), name


def test_one_missing_weight_leaves_the_others(tmp_path):
    model = randomise(tiny("mag"), scale=0.3)
    lost = "model.blocks.1.layer.remember.memory.memory_model_parameters.0"
    assert lost in model.state_dict()
    save_without(model, tmp_path, lambda name: name == lost)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert tensor.equal(model.state_dict()[name]) == (name != lost), name
    assert loaded.state_dict()[lost].std().item() == pytest.approx(tiny("mag").state_dict()[lost].std().item(), rel=0.3)
    assert loaded(IDS).logits.isfinite().all()


def test_mismatched_weights(tmp_path):
    tiny().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, vocab_size=300, ignore_mismatched_sizes=True)
    wanted = tiny(vocab_size=300).state_dict()
    for name in ("model.token_emb.weight", "model.to_logits.weight"):
        assert loaded.state_dict()[name].std().item() == pytest.approx(wanted[name].std().item(), rel=0.05)
    assert loaded(IDS + 250).logits.isfinite().all()


@pytest.mark.parametrize("name", ["tie_embeddings", "tie_word_embeddings"])
@pytest.mark.parametrize("tied", [True, False])
def test_ties_are_one_setting(name, tied, tmp_path):
    """By either name, also over what a folder says."""
    model = tiny(tie_embeddings=not tied)
    model.save_pretrained(tmp_path)
    assert "tie_word_embeddings" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **{name: tied})
    assert loaded.config.tie_embeddings is loaded.config.tie_word_embeddings is tied
    assert (loaded.model.to_logits.weight is loaded.model.token_emb.weight) is tied
    assert loaded.model.config.tie_embeddings is tied
    assert loaded.model.token_emb.weight.equal(model.model.token_emb.weight)
    assert loaded.model.to_logits.weight.isfinite().all()
    assert TitansHFConfig(**{name: tied}).to_model().tie_embeddings is tied
    loaded.config.tie_word_embeddings = not tied
    assert loaded.config.tie_embeddings is not tied
    with pytest.raises(ValueError, match="tie_embeddings cannot be combined with another tie_word_embeddings"):
        TitansHFConfig(tie_embeddings=True, tie_word_embeddings=False)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [26, 14])
@pytest.mark.parametrize("mean", [True, False])
def test_a_resized_vocabulary(mean, size, tied, tmp_path):
    model, before = tiny(tie_embeddings=tied), tiny(tie_embeddings=tied)
    embedding = model.resize_token_embeddings(size, mean_resizing=mean)
    assert embedding is model.model.token_emb
    assert model.config.vocab_size == model.model.config.vocab_size == model.model.to_logits.out_features == size
    assert (model.model.to_logits.weight is embedding.weight) is tied
    ids, kept = IDS % min(size, 20), min(size, 20)
    torch.testing.assert_close(model(ids).logits[..., :kept], before(ids).logits[..., :kept])
    if size > 20 and not mean:
        assert embedding.weight[20:].std().item() == pytest.approx(0.02, rel=0.5)
    last = torch.full((1, 3), size - 1)
    loss = model(last, labels=last).loss
    torch.testing.assert_close(loss, model.model(last, return_loss=True))
    assert model.model.sample(last, 9).max() < size
    with pytest.raises(ValueError, match=f"ids from 0 to {size - 1}"):
        model(last + 1)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again(ids).logits.equal(model(ids).logits)
    assert again.generate(last, max_new_tokens=4, do_sample=False).equal(
        model.generate(last, max_new_tokens=4, do_sample=False)
    )


ON_DISK = {"model.token_emb": "cpu", "model.blocks": "disk", "model.norm": "disk", "model.to_logits": "cpu"}


WAYS = {
    "from_pretrained, blocks": lambda f: load(f, device_map=ON_DISK, offload_folder=str(f / "off")),
    "from_pretrained, all": lambda f: load(f, device_map={"": "disk"}, offload_folder=str(f / "off")),
    "dispatch": lambda f: dispatch_model(load(f), ON_DISK, offload_dir=str(f / "off")),
    "cpu_offload": lambda f: cpu_offload(load(f), "cpu"),
    "disk_offload": lambda f: disk_offload(load(f), str(f / "off"), "cpu"),
}


def load(folder, **options):
    return TitansForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_kept_elsewhere(variant, way, tied, tmp_path):
    model = randomise(tiny(variant, tie_embeddings=tied), scale=0.3)
    model.save_pretrained(tmp_path)
    away = WAYS[way](tmp_path).eval()
    if way == "from_pretrained, all" and not hasattr(away, "_hf_hook"):
        pytest.skip("older versions of transformers leave such a model without weights")
    inside = [p for p in away.model.blocks.parameters() if p.numel()]
    assert all(p.device.type == "meta" for p in inside)
    with torch.no_grad():
        for _ in range(2):
            assert away(IDS).logits.equal(model(IDS).logits)
        assert all(p.device.type == "meta" for p in inside)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert away.generate(IDS, **options).equal(model.generate(IDS, **options))


def test_a_failed_call_leaves_offloaded_weights_usable(tmp_path):
    model = tiny("mac")
    model.save_pretrained(tmp_path)
    away = cpu_offload(load(tmp_path), "cpu").eval()
    norm = away.model.blocks[1].layer.norm

    def fail(module, args):
        raise RuntimeError("no")

    handle = norm.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"), torch.no_grad():
        away(IDS)
    handle.remove()
    with torch.no_grad():
        assert away(IDS).logits.equal(model(IDS).logits)
    assert copy.deepcopy(model)(IDS).logits.equal(model(IDS).logits)
