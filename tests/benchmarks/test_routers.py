"""Gates that know contexts: the oracle does as it is told; the recogniser has to learn, and is told nothing later."""

import torch
from harness.arms import Arm, build, controls_of
from harness.switches import watched
from harness.task import Setting
from tasks.interference import Interference
from tasks.routers import Recogniser, Told, lesson, middle, recognising_memory, tell, told_memory

from titans_pytorch.gates.paging import circle_bucket

TASK = Interference(dim=16, pairs=4, context=4, chunk_size=4, batch_size=4)
ALONE = {"use_symplectic_gating": True, "num_pages": 2, "read_active_page_only": True}
TOLD = Arm("told", ALONE, make=told_memory)
TAUGHT = Arm("taught", ALONE, make=recognising_memory, penalty=lesson)


def episode(seed=0):
    return next(iter(TASK.batches(seed, "test", 1)))


def test_the_middle_of_a_page_lies_on_it():
    for pages in (2, 3, 5):
        angles = torch.tensor([middle(page, pages) for page in range(pages)])
        assert circle_bucket(angles, pages).tolist() == list(range(pages))


def test_told_pages_keep_apart_what_is_written():
    """Bit for bit: B leaves A's answers as they were. Where all pages are read, or none is turned, it does not."""
    with torch.no_grad():
        apart = TASK.scores(build(TASK, TOLD, 0), episode())
        assert float(apart["forgetting"]) == 0.0
        pooled = Arm("pooled", {**ALONE, "read_active_page_only": False}, make=told_memory)
        never = next(arm for arm in controls_of(TOLD) if arm.name == "told/never")
        for other in (pooled, never):
            assert float(TASK.scores(build(TASK, other, 0), episode())["forgetting"]) != 0.0


def test_an_oracle_turns_to_the_page_it_is_told():
    memory = build(TASK, TOLD, 0)
    x = torch.randn(2, 8, 16)
    for page in (1, 0, 1):
        tell(memory, page)
        assert memory(x)[1].active_page_indices.tolist() == [page] * 2
    assert isinstance(memory.symplectic_gate, Told)
    assert not list(memory.symplectic_gate.parameters())


def trained(steps, seed=0):
    torch.manual_seed(seed)
    task = Interference(dim=16, pairs=8, context=8, chunk_size=8, batch_size=8)
    memory = build(task, TAUGHT, seed)
    gate = memory.symplectic_gate
    optimizer = torch.optim.Adam(gate.parameters(), lr=1e-2)
    losses = []
    for batch in task.batches(seed, "train", steps):
        for which, values in enumerate((batch.a, batch.b)):
            tell(memory, which, task.context, task.pairs)
            pairs = torch.cat((batch.keys, values), dim=-1)
            tokens = torch.cat((batch.context[which].expand(len(pairs), -1, -1), pairs), dim=1)
            gate(memory.projections.store_norm(tokens))
        losses.append(lesson(memory, []))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return task, memory.eval(), [loss.item() for loss in losses]


def test_a_recogniser_learns_which_context_it_is_in():
    task, memory, losses = trained(60)
    assert losses[-1] < 0.1 * losses[0]
    assert not memory.symplectic_gate.lessons
    (batch,) = task.batches(0, "test", 1)
    with torch.no_grad(), watched(memory) as seen:
        for which, values in ((1, batch.b), (0, batch.a), (1, None)):
            tell(memory, 1 - which, task.context, task.pairs)  # told nothing by it: nobody is learning
            values = torch.zeros_like(batch.a) if values is None else values
            pairs = torch.cat((batch.keys, values), dim=-1)
            tokens = torch.cat((batch.context[which].expand(len(pairs), -1, -1), pairs), dim=1)
            assert memory(tokens)[1].active_page_indices.tolist() == [which] * len(pairs)
    assert 0.5 <= seen.record()["switch_rate"] < 0.6  # at the context, and (nearly) never at the pairs


def test_a_lesson_moves_the_gate_alone_and_ends_with_training():
    memory = build(TASK, TAUGHT, 0).train()
    TASK.loss(memory, episode())
    found = lesson(memory, [])
    grads = torch.autograd.grad(found, list(memory.parameters()), allow_unused=True)
    moved = {name for (name, _), grad in zip(memory.named_parameters(), grads, strict=True) if grad is not None}
    assert {"gates.symplectic_gate.map.weight", "gates.symplectic_gate.map.bias"} <= moved
    assert all(name.startswith(("gates.symplectic_gate.", "projections.store_norm.")) for name in moved)
    with torch.no_grad():
        TASK.loss(memory, episode())
    assert float(lesson(memory, [])) == 0.0
    assert isinstance(memory.symplectic_gate, Recogniser)


def test_arms_that_differ_in_thresholds_share_a_plain_memory():
    paged = {"use_symplectic_gating": True, "num_pages": 2}
    arms = [Arm(str(t), {**paged, "symplectic_page_threshold": t}) for t in (0.1, 0.5)]
    plain = [controls_of(arm)[0] for arm in (*arms, Arm("rate", paged, switch_rate=0.5))]
    assert len({str(arm.what()) for arm in plain}) == 1
    assert controls_of(Arm("wide", {**paged, "symplectic_gate_kwargs": {"gated": True}}))[0].what() != plain[0].what()
    one = TASK.run(plain[0], 0, Setting(steps=1, test_batches=1))
    assert one["parameters"] >= sum(p.numel() for p in build(TASK, arms[0], 0).parameters())
