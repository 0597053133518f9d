"""Trainer, gradient checkpointing, sharding, and runs of `titans train` taken over."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch import multiprocessing as mp
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from titans_pytorch import TitansConfig, build_model
from titans_pytorch.cli.main import main as titans
from titans_pytorch.hf import TitansForCausalLM
from titans_pytorch.hf.convert import main as convert
from titans_pytorch.models.config import VARIANTS
from titans_pytorch.models.language_model import Block
from titans_pytorch.models.runs import load_run
from titans_pytorch.training.checkpoint import save_weights

from ..helpers import randomise
from .tiny import IDS, tiny


def test_trainer(tmp_path):
    """Learns, saves, resumes; with gradient checkpointing the losses are the same."""
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(8, 1)]
    losses = []
    for checkpointing in (False, True):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(checkpointing)),
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=2e-2,
            logging_steps=1,
            save_steps=3,
            gradient_checkpointing=checkpointing,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model=tiny(memory_loss_weight=0.01), args=arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    trained = trainer.model.eval()
    last = TitansForCausalLM.from_pretrained(tmp_path / "True" / "checkpoint-6").eval()
    assert last(IDS).logits.equal(trained(IDS).logits)
    trainer = Trainer(model=tiny(memory_loss_weight=0.01), args=arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(tmp_path / "True" / "checkpoint-3"))
    again = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert again[-3:] == pytest.approx(losses[1][-3:], rel=1e-4)


def test_gradient_checkpointing_computes_blocks_again(monkeypatch):
    model = tiny("mag").train()
    model._set_gradient_checkpointing()
    calls = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *args: calls.append(0) or forward(self, *args))
    model(IDS, labels=IDS).loss.backward()
    assert len(calls) == 2 * model.config.n_layers


def test_blocks_are_the_unit_of_placement():
    kinds = {type(module).__name__ for variant in VARIANTS for module in tiny(variant).modules()}
    assert set(TitansForCausalLM._no_split_modules) <= kinds


def _sharded(rank: int, world: int, port: int, variant: str, folder: str) -> None:
    """One process: each block sharded, one step of training on its rows."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=world)
    model = tiny(variant).train()
    for block in model.model.blocks:
        fully_shard(block)
    fully_shard(model)
    rows = IDS[rank::world] if world > 1 else IDS
    loss = model(rows, labels=rows).loss
    loss.backward()
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    after = model(rows, labels=rows).loss
    if rank == 0:
        torch.save({"grads": grads, "loss": loss.item(), "after": after.item()}, f"{folder}/found.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm"])
def test_sharded_block_by_block(variant, tmp_path):
    """FSDP2 on the CPU: the gradients of processes that share the rows are those of one."""
    port = 29_500 + os.getpid() % 1000
    world = 2
    mp.spawn(_sharded, args=(world, port, variant, str(tmp_path)), nprocs=world)
    found = torch.load(tmp_path / "found.pt")
    model = tiny(variant).train()
    model(IDS, labels=IDS).loss.backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found["grads"].keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found["grads"][name], grad, atol=1e-6, rtol=1e-4)
    assert found["after"] < found["loss"]


def test_convert_a_run(tmp_path, capsys):
    config = TitansConfig.tiny(variant="mal", d_model=16, n_heads=2, mem_heads=2)
    model = build_model(config).eval()
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(config.to_json())
    save_weights(model, run / "model.safetensors")
    assert convert([str(run), str(tmp_path / "out")]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.to_model() == config.model
    assert again(IDS).logits.equal(model(IDS))

    back = tmp_path / "back"
    assert convert([str(tmp_path / "out"), str(back)]) == 0
    for name in ("config.json", "model.safetensors"):
        assert (back / name).read_bytes() == (run / name).read_bytes(), name

    assert convert([str(run), str(tmp_path / "out")]) == 1
    assert "out must be a new or an empty folder" in capsys.readouterr().err
    assert convert([str(tmp_path / "none"), str(tmp_path / "other")]) == 1
    assert "holds no run" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_an_unknown_option_of_the_conversion(capsys):
    with pytest.raises(SystemExit) as stopped:
        convert(["run", "out", "--versoin"])
    assert stopped.value.code == 2
    assert "the nearest is --version" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{}, {"tie_embeddings": True}, {"gate": "convex", "init_gate_bias": -2.0}])
def test_a_model_that_transformers_saved_becomes_a_run(tmp_path, settings, capsys):
    """Its weights in float32 and defaults for the rest; the command line opens it."""
    model = randomise(tiny("mag", vocab_size=256, **settings), scale=0.3)
    model.save_pretrained(tmp_path / "saved")
    assert convert([str(tmp_path / "saved"), str(tmp_path / "run")]) == 0
    run, again = load_run(tmp_path / "run", torch.device("cpu"))
    assert run == TitansConfig(model.config.to_model())
    with torch.no_grad():
        assert again(IDS).equal(model(IDS).logits)
    assert titans(["sample", str(tmp_path / "run"), "--prompt", "ab", "--new-bytes", "4"]) == 0

    weights = load_file(tmp_path / "saved" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
    assert convert([str(tmp_path / "saved"), str(tmp_path / "other")]) == 1
    assert "it lacks 1 tensors, model.norm.weight first" in capsys.readouterr().err

    (tmp_path / "saved" / "model.safetensors").write_bytes(b"cut off")
    assert convert([str(tmp_path / "saved"), str(tmp_path / "other")]) == 1
    assert "holds no model of titans" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
