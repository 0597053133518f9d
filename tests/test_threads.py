"""Several threads and tasks with one model: each gets what it would get alone."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from titans_pytorch import MemoryAsContextTransformer, MemoryMLP, NeuralMemory
from titans_pytorch.analysis.storing import memories_of, stop_storing, storing_off
from titans_pytorch.analysis.trace import trace_memories
from titans_pytorch.common import switches
from titans_pytorch.common.switches import evaluating, with_switches_of_now
from titans_pytorch.memory.state import LazyTensors
from titans_pytorch.models.config import TitansConfig
from titans_pytorch.models.family import build_model
from titans_pytorch.tasks.benefit import benefit_on_text
from titans_pytorch.tasks.registry import build_task
from titans_pytorch.training.evaluate import bits_per_byte, sample_text

CPU = torch.device("cpu")


def transformer() -> nn.Module:
    torch.manual_seed(0)
    memory = {"dim_head": 8, "heads": 2, "default_step_transform_max_lr": 0.1, "attn_pool_chunks": True}
    return MemoryAsContextTransformer(
        num_tokens=256,
        dim=16,
        depth=2,
        segment_len=8,
        heads=2,
        dim_head=8,
        num_residual_streams=1,
        neural_memory_layers=(2,),
        neural_memory_segment_len=4,
        neural_memory_model=MemoryMLP(8, depth=1),
        neural_memory_kwargs=memory,
    )


def of_the_family(variant: str = "mac") -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "mem_heads": 2, "window": 8, "chunk_size": 4, "mem_layers": 1}
    return build_model(TitansConfig.of(variant=variant, **sizes).model, CPU)


def memory() -> NeuralMemory:
    torch.manual_seed(0)
    return NeuralMemory(8, 2, model=MemoryMLP(8, depth=1))


def in_a_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


# what may run side by side


def jobs(model: nn.Module) -> dict:
    torch.manual_seed(1)
    text = torch.randint(256, (120,)).byte()
    ids = text[None, :40].long()

    def logits():
        with torch.no_grad():
            return model(ids)

    def without_storing():
        with storing_off(model):
            return logits()

    def gradient():
        return torch.autograd.grad(model(ids, return_loss=True), model.to_logits.weight)[0]

    def written():
        return sample_text(model, text[:12], 8, temperature=0.9, seed=3, device=CPU, autocast=torch.no_grad)

    def bits():
        return bits_per_byte(model, text, context=20, stride=10, batch_size=4)

    return {
        "logits": logits,
        "without storing": without_storing,
        "gradient": gradient,
        "sample": written,
        "bits": bits,
        "benefit": lambda: benefit_on_text(model, text.view(4, 30)),
        "trace": lambda: [trace.to_dict() for trace in trace_memories(model, ids, 8)],
        "task": lambda: build_task("copy", {"payload": 2, "length": 16, "segment_len": 8}).score(model, 4),
    }


def equal(a, b) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("build", [transformer, of_the_family])
def test_each_thread_gets_what_it_would_get_alone(build):
    model = build().eval()
    work = jobs(model)
    alone = {name: job() for name, job in work.items()}
    assert not torch.equal(alone["logits"], alone["without storing"])
    begin = threading.Barrier(len(work))

    def repeat(name):
        begin.wait()
        return [equal(work[name](), alone[name]) for _ in range(5)]

    with ThreadPoolExecutor(len(work)) as pool:
        found = dict(zip(work, pool.map(repeat, work), strict=True))
    assert found == {name: [True] * 5 for name in work}
    assert not model.training


def test_tasks_of_asyncio_have_switches_of_their_own():
    model = memory()
    x = torch.randn(1, 12, 8)
    with torch.no_grad():
        plain = model(x)[0]
        with storing_off(model):
            still = model(x)[0]
    found = {"off": [], "on": []}

    @torch.no_grad()
    async def off():
        with storing_off(model):
            for _ in range(3):
                found["off"].append(model(x)[0])
                await asyncio.sleep(0)

    @torch.no_grad()
    async def on():
        for _ in range(3):
            found["on"].append(model(x)[0])
            await asyncio.sleep(0)

    async def both():
        await asyncio.gather(off(), on())

    asyncio.run(both())
    assert not torch.equal(plain, still)
    assert all(torch.equal(out, still) for out in found["off"])
    assert all(torch.equal(out, plain) for out in found["on"])


# the switch


def test_the_switch_names_its_memories_and_ends_with_the_last_call():
    first, second = memory(), memory()
    outer, inner = stop_storing(nn.ModuleList([first, second])), stop_storing(first)
    outer()
    assert not switches.stores(first)
    assert switches.stores(second)
    outer()  # again: nothing
    inner()
    assert switches.stores(first)
    with pytest.raises(KeyboardInterrupt), storing_off(first):
        raise KeyboardInterrupt
    assert switches.stores(first)


def test_storing_is_resumed_where_it_was_stopped():
    resume = stop_storing(model := memory())
    with pytest.raises(RuntimeError, match="in another thread or task"):
        in_a_thread(resume)
    assert not switches.stores(model)
    assert in_a_thread(switches.stores, model)
    assert not in_a_thread(with_switches_of_now(switches.stores), model)
    resume()
    assert switches.stores(model)


def test_compiled_models_see_the_switch_of_their_caller():
    torch.compiler.reset()
    model = memory().eval()
    x = torch.randn(1, 12, 8)
    compiled = torch.compile(lambda x: model(x)[0], backend="eager", fullgraph=True)
    with torch.no_grad():
        plain = compiled(x)
        with storing_off(model):
            still = compiled(x)
            torch.testing.assert_close(still, model(x)[0])

            def elsewhere():
                with torch.no_grad():
                    return compiled(x)

            assert torch.equal(in_a_thread(elsewhere), plain)
        assert torch.equal(compiled(x), plain)
        assert not torch.allclose(plain, still)


@pytest.mark.parametrize("stopped", [True, False])
def test_checkpointed_blocks_are_recomputed_with_the_switch_of_their_forward_pass(stopped):
    model = of_the_family().train()
    ids = torch.randint(256, (1, 33))

    def gradients(backward_within: bool):
        model.zero_grad()
        resume = stop_storing(model) if stopped else lambda: None
        loss = model(ids, return_loss=True)
        if backward_within:
            loss.backward()
            resume()
        else:
            resume()
            with nullcontext() if stopped else storing_off(model):  # as wrong as it can be
                loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(True)
    model.gradient_checkpointing = True
    for within in (True, False):
        got = gradients(within)
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], msg=name)


def test_a_checkpoint_of_ones_own():
    model, x = memory(), torch.randn(1, 8, 8, requires_grad=True)

    def gradient(run):
        with storing_off(model):
            out = run(x)
        return torch.autograd.grad(out.square().sum(), x)[0]

    def block(x):
        return model(x)[0]

    got = gradient(lambda x: checkpoint(with_switches_of_now(block), x, use_reentrant=False))
    torch.testing.assert_close(got, gradient(block))


def test_threads_of_autograd_take_the_switch_of_the_caller_of_backward(monkeypatch):
    """As `torch.autograd.graph` leaves the caller's context for the threads of accelerators."""
    import contextvars

    model = memory()
    with storing_off(model):
        context = contextvars.copy_context()
    monkeypatch.setattr(switches, "in_backward", lambda: True)

    def of_autograd():
        torch._C._stash_obj_in_tls("context", context)
        try:
            return switches.stores(model), with_switches_of_now(switches.stores)(model), switches.stores(model)
        finally:
            torch._C._remove_obj_from_tls("context")

    assert in_a_thread(of_autograd) == (False, False, False)
    assert switches.stores(model)


def test_replicas_of_data_parallel_keep_the_switch():
    model, x = memory(), torch.randn(1, 8, 8)

    def run(replica):
        with torch.no_grad():
            return replica(x)[0]

    def replica_of(memory):
        replica = memory._replicate_for_data_parallel()
        replica._parameters, replica._modules = dict(memory._parameters), dict(memory._modules)
        return replica

    with storing_off(model):
        still = run(model)
        assert torch.equal(in_a_thread(run, replica_of(model)), still)
    assert torch.equal(in_a_thread(run, replica_of(model)), run(model))
    assert not torch.equal(run(model), still)


# eval mode


def test_modules_get_their_own_mode_back():
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout())).train()
    model[1].eval()  # frozen
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False, False]


def test_the_last_evaluation_to_end_restores_the_mode():
    model = nn.Linear(1, 1).train()
    inside, leave, seen = threading.Event(), threading.Event(), []

    def longer():
        with evaluating(model):
            inside.set()
            leave.wait(10)
            seen.append(model.training)

    thread = threading.Thread(target=longer)
    with evaluating(model):
        thread.start()
        inside.wait(10)
    assert not model.training
    leave.set()
    thread.join()
    assert seen == [False]
    assert model.training
    assert not switches._held


class Breaks(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(1, 1).eval()

    def forward(self, ids, **options):
        raise KeyboardInterrupt

    def sample(self, *args, **options):
        raise KeyboardInterrupt


EVALUATIONS = {
    "bits": lambda m: bits_per_byte(m, torch.zeros(9).byte(), context=4, stride=2, batch_size=2),
    "sample": lambda m: sample_text(
        m, torch.zeros(4).byte(), 2, temperature=1.0, seed=0, device=CPU, autocast=torch.no_grad
    ),
    "benefit": lambda m: benefit_on_text(m, torch.zeros(2, 5)),
    "trace": lambda m: trace_memories(m, torch.zeros(1, 4).long()),
    "task": lambda m: build_task("copy", {"payload": 2, "length": 16, "segment_len": 8}).score(m, 1),
}


@pytest.mark.parametrize("evaluate", EVALUATIONS.values(), ids=EVALUATIONS)
def test_an_interrupted_evaluation_leaves_the_modes_as_they_were(evaluate):
    model = Breaks()
    with pytest.raises(KeyboardInterrupt):
        evaluate(model)
    assert model.training
    assert not model.frozen.training


# counters and lazy states


def test_switches_of_pages_are_counted_by_all_threads():
    torch.manual_seed(0)
    model = NeuralMemory(
        8, 2, use_symplectic_gating=True, num_pages=2, symplectic_page_threshold=0.0, model=MemoryMLP(8, depth=1)
    )
    x = torch.randn(4, 8, 8)

    def run(_):
        with torch.no_grad():
            model(x)

    run(0)
    one = int(model.page_switch_events)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(40)))
    assert one > 0
    assert int(model.page_switch_events) == 41 * one


def test_a_lazy_state_is_read_by_several_threads():
    def slow(name):
        time.sleep(0.01)
        return torch.full((1,), float(name))

    for _ in range(5):
        lazy = LazyTensors(["1", "2"], slow)
        begin = threading.Barrier(4)

        def read(order, lazy=lazy, begin=begin):
            begin.wait()
            return {name: float(lazy[name]) for name in order}

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(read, (["1", "2"], ["2", "1"], ["1", "2"], ["2", "1"])))
        assert all(values == {"1": 1.0, "2": 2.0} for values in found)


def test_conversations_from_one_prefix_go_on_in_threads():
    model = of_the_family().eval()
    ids = torch.randint(256, (8, 1, 9))
    with torch.no_grad():
        _, prefix = model(torch.randint(256, (1, 21)), return_cache=True)

    def follow(row):
        with torch.no_grad():
            return model(row, cache=prefix, return_cache=True)[0]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(follow, ids))
    assert all(torch.equal(a, follow(row)) for a, row in zip(together, ids, strict=True))
    assert memories_of(model)
