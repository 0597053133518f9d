"""Law 7 of the memory: whatever it runs under, the numbers are the same, or as near as the precision allows.

Reads and writes take an inner gradient, which is where modes go wrong: so every kind of model and rule stands here.
"""

import copy
import pickle
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from ..helpers import assert_close, assert_same_gradients, gradients, relative_error
from .subjects import AXES, MODELS, Subject, huber, joined, option_sets, tolerance

PLAIN = {name: values[0] for name, values in AXES}

VARIANTS = {f"{name} model": {"model": name} for name in MODELS} | {
    "reference": {"engine": "reference"},
    "matrix": {"engine": "matrix", "batch_chunks": 2},
    "own loss": {"store_memory_loss_fn": huber, "max_grad_norm": 0.5, "per_parameter_lr_modulation": True},
    "spectral": {"spectral_norm_surprises": True, "heads": 2, "dim_head": 4},
    "orders": {
        "momentum_order": 3,
        "learned_momentum_combine": True,
        "learned_combine_include_zeroth": True,
        "batch_chunks": 2,
        "gated_transition": True,
    },
    "residual": {"accept_weight_residual": True, "batch_chunks": 2, "heads": 2},
    "residual, foreign": {"accept_weight_residual": True, "model": "foreign", "store_memory_loss_fn": huber},
    "residual, ghost": {"accept_weight_residual": True, "model": "ghost", "batch_chunks": 1},
    "views": {
        "chunk_size": (2, 4),
        "model": "attention",
        "heads": 2,
        "dim_head": 4,
        "qkv_receives_diff_views": True,
        "num_kv_per_token": 2,
        "store_with_lookahead_value": True,
        "attn_pool_chunks": True,
        "qk_rmsnorm": True,
        "post_rmsnorm": True,
        "activation": nn.SiLU(),
    },
    "gates": {"use_dmd_gating": True, "use_symplectic_gating": True, "kinetics_coupling": True},
    "pages": {
        "use_symplectic_gating": True,
        "symplectic_gate_kwargs": "phase",
        "num_pages": 2,
        "manifold_state_keyed_paging": True,
        "batch_chunks": 2,
        "heads": 2,
    },
    "paper": {
        "chunk_size": 1,
        "batch_chunks": 4,
        "activation": nn.SiLU(),
        "qkv_conv_kernel": 4,
        "qk_l2norm": True,
        "output_gate": "silu",
    },
    "exact": {
        "chunk_size": 1,
        "batch_chunks": 1,
        "model": "linear",
        "mem_model_norm_add_residual": False,
        "heads": 2,
        "dim_head": 4,
        "qk_l2norm": True,
        "gated_transition": True,
    },
    "threshold": {"surprise_threshold": 1.0, "batch_chunks": 2, "heads": 2, "dim_head": 4},
    "threshold, own loss": {"surprise_threshold": 0.4, "store_memory_loss_fn": huber, "chunk_size": 1},
    "threshold, ghost": {"surprise_threshold": 1.0, "model": "ghost", "chunk_size": 2},
    "prediction": {"surprise_threshold": 1.0, "surprise_source": "prediction", "chunk_size": 1, "batch_chunks": 4},
    "own step": {"momentum": False, "per_head_learned_parameters": False, "heads": 2, "pre_rmsnorm": False},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)
sampled = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
N, CUTS = 11, (4, 5)


def subject_of(variant, dtype=torch.float64) -> Subject:
    options = PLAIN | VARIANTS[variant]
    engine = options.pop("engine", "auto")
    return Subject(options, engine, dtype=dtype)


def limit_of(variant, exact=1e-10) -> float:
    return max(exact, tolerance(PLAIN | VARIANTS[variant]) if exact < 1e-6 else 0.0)


def tensors(state) -> list[torch.Tensor]:
    """What the memories carry out: last memory, momentum, and all updates."""
    out = []
    for own in state:
        if own is not None:
            out += [*own.states[0].values(), *own.states[1].values(), *own.updates.values()]
    return out


def run(subject, seq, mask=None):
    """Three calls, the state carried: (retrieved, all that is carried out, losses and steps)."""
    out, state, surprises = subject.pieces(seq, CUTS, mask)
    return out, tensors(state), surprises


def all_of(result) -> list[torch.Tensor]:
    out, carried, surprises = result
    return [out, *carried, *surprises]


def assert_same(got, wanted, limit):
    for a, b in zip(all_of(got), all_of(wanted), strict=True):
        assert_close(a, b, limit)


def the_mask():
    return torch.rand(2, N, generator=torch.Generator().manual_seed(1)) > 0.3


@each_variant
def test_no_grad_and_inference_mode(variant):
    """Equal to grad mode, over a carried state; nothing asks for a gradient."""
    subject = subject_of(variant)
    seq = subject.sequence(2, N)
    wanted = run(subject, seq, the_mask())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = run(subject, seq, the_mask())
            assert not any(t.requires_grad for t in all_of(got))
        assert_same(got, wanted, limit_of(variant, 1e-12))


@each_variant
def test_a_state_goes_from_mode_to_mode(variant):
    """Read without gradients, then train on; train, then read without gradients."""
    subject = subject_of(variant)
    seq = subject.sequence(2, N)
    whole = subject(seq)[0]
    with torch.no_grad():
        _, state, _ = subject(seq[..., :5, :])
    out, state, _ = subject(seq[..., 5:, :], state)
    assert_close(out, whole[:, 5:], limit_of(variant))
    out.sum().backward()
    _, state, _ = subject(seq[..., :5, :])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = subject(seq[..., 5:, :], state)
            assert not got[0].requires_grad
        assert_close(got[0], whole[:, 5:], limit_of(variant))
        assert not any(t.requires_grad for t in tensors(got[1]))


def differentiated(subject, seq, call):
    leaves = subject.parameters | {"seq": seq.requires_grad_()}
    result = call(subject, seq)
    return result, gradients(all_of(result), leaves)


def checkpointed(subject, seq):
    return checkpoint(run, subject, seq, use_reentrant=False)


def checkpointed_call_by_call(subject, seq):
    """The state goes from one checkpointed call into the next."""
    outs, state, surprises = [], None, []
    for piece in seq.split((4, 1, N - 5), dim=-2):
        out, state, found = checkpoint(subject, piece, state, use_reentrant=False)
        outs.append(out), surprises.append(found)
    return torch.cat(outs, dim=1), tensors(state), joined(surprises)


def saved_on_cpu(subject, seq):
    with torch.autograd.graph.save_on_cpu():
        return run(subject, seq)


def packed(subject, seq):
    """Saved tensors are kept as copies: nothing may reach round the hooks."""
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        return run(subject, seq)


@each_variant
@pytest.mark.parametrize(
    "call", [checkpointed, checkpointed_call_by_call, saved_on_cpu, packed], ids=lambda f: f.__name__
)
def test_checkpoints_and_hooks_on_saved_tensors(variant, call):
    subject = subject_of(variant)
    seq = subject.sequence(2, N)
    wanted, wanted_grads = differentiated(subject, seq, run)
    got, grads = differentiated(subject, seq, call)
    assert_same(got, wanted, limit_of(variant, 1e-12))
    assert_same_gradients(grads, wanted_grads, limit_of(variant))


@sampled
@given(option_sets)
def test_checkpointing_any_options(options):
    subject = Subject(options)
    seq = subject.sequence(2, N)
    wanted, wanted_grads = differentiated(subject, seq, run)
    got, grads = differentiated(subject, seq, checkpointed_call_by_call)
    assert_same(got, wanted, tolerance(options))
    assert_same_gradients(grads, wanted_grads, tolerance(options) * 10)


@sampled
@given(option_sets)
def test_inference_with_any_options(options):
    subject = Subject(options)
    seq = subject.sequence(2, N)
    wanted = run(subject, seq, the_mask())
    with torch.inference_mode():
        assert_same(run(subject, seq, the_mask()), wanted, tolerance(options))


@sampled
@given(option_sets)
def test_copies_with_any_options(options):
    """pickle, deepcopy, and a state dict loaded into a memory that began elsewhere."""
    subject = Subject(options)
    seq = subject.sequence(2, N)
    with torch.no_grad():
        wanted = run(subject, seq)
        other = Subject(options, seed=7)
        assert relative_error(run(other, seq)[0], wanted[0]) > 1e-4
        other.memory.load_state_dict(subject.memory.state_dict())
        if subject.earlier is not None:
            other.earlier.load_state_dict(subject.earlier.state_dict())
        for twin in (other, copy.deepcopy(subject), pickle.loads(pickle.dumps(subject))):
            for got, want in zip(all_of(run(twin, seq)), all_of(wanted), strict=True):
                assert torch.equal(got, want)


def in_dtype(subject, dtype) -> Subject:
    twin = copy.deepcopy(subject)
    twin.memory.to(dtype)
    if twin.earlier is not None:
        twin.earlier.to(dtype)
    return twin


@each_variant
def test_dtypes(variant):
    """A memory moved to float32 errs by float32's rounding, one moved to bfloat16 by that of its projections: itself it
    stays in float32."""
    subject = subject_of(variant)
    seq = subject.sequence(2, N)
    wanted = run(subject, seq)[0]
    for dtype, kept_in, limit in ((torch.float32, torch.float32, 2e-4), (torch.bfloat16, torch.float32, 0.15)):
        limit = limit * 20 if variant == "spectral" else limit
        twin = in_dtype(subject, dtype)
        out, state, _ = twin(seq.to(dtype))
        more, state, _ = twin(seq.to(dtype), state)
        assert out.dtype == more.dtype == dtype
        assert {t.dtype for t in tensors(state)} == {kept_in}
        assert more.isfinite().all()
        assert relative_error(run(twin, seq.to(dtype))[0], wanted) < limit
        for name, grad in gradients([more], twin.parameters).items():
            assert grad.dtype == dtype
            assert grad.isfinite().all(), name
        back = in_dtype(twin, torch.float64)
        assert relative_error(run(back, seq)[0], wanted) < limit


@each_variant
def test_autocast(variant):
    """bfloat16 for the projections, float32 for the memory: near, finite, and a carried state streams on, into the mode
    and out of it."""
    subject = subject_of(variant, torch.float32)
    seq = subject.sequence(2, N).float()
    wanted = run(subject, seq)
    limit = 1.0 if variant == "spectral" else 0.15
    with torch.autocast("cpu", torch.bfloat16):
        got = run(subject, seq)
        _, state, _ = subject(seq[..., :5, :])
        inside, _, _ = subject(seq[..., 5:, :], state)
    assert {t.dtype for t in got[1]} == {torch.float32}
    assert relative_error(got[0], wanted[0]) < limit
    outside, _, _ = subject(seq[..., 5:, :], state)
    for out in (inside, outside):
        assert relative_error(out, wanted[0][:, 5:]) < limit
    late = tensors(state)
    assert {t.dtype for t in late} == {torch.float32}
    for name, grad in gradients([got[0]], subject.parameters).items():
        assert grad.isfinite().all(), name


@each_variant
def test_backward_under_autocast(variant):
    """Where it should not be called, but often is: it runs, and points the same way."""
    subject = subject_of(variant, torch.float32)
    seq = subject.sequence(2, N).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradients([run(subject, seq)[0]], subject.parameters)
        out = run(subject, seq)[0]
    outside = gradients([out], subject.parameters)
    inside, outside = (torch.cat([g.flatten() for g in grads.values()]) for grads in (inside, outside))
    assert torch.cosine_similarity(inside, outside, dim=0) > (0.5 if variant == "spectral" else 0.98)


def test_autocast_keeps_small_decays():
    """In bfloat16 a decay of a thousandth would be none, or four."""
    subject = Subject(PLAIN | {"init_decay_bias": -7.0}, dtype=torch.float32)
    tokens = torch.randn(2, 12, 6)
    subject.memory.rates.to_decay_factor.weight.data.zero_()
    subject.memory.rates.to_decay_factor.bias.data.fill_(-7.0)
    with torch.autocast("cpu", torch.bfloat16):
        keep = subject.memory.rates(tokens, 3, False).retention
    assert_close(1 - keep, torch.full_like(keep, -7.0).sigmoid(), 1e-3)


@pytest.mark.parametrize("variant", ["mlp model", "foreign model", "residual, ghost", "orders", "views"])
def test_every_parameter_gets_a_gradient(variant):
    """As data-parallel training needs it, which waits for all of them."""
    subject = subject_of(variant)
    out, _, _ = subject(subject.sequence(2, 25))
    out.sum().backward()
    assert [name for name, p in subject.memory.named_parameters() if p.grad is None] == []


@pytest.fixture
def one_process():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("variant", ["orders", "foreign model"])
def test_distributed_data_parallel(variant, one_process):
    """Two steps, without find_unused_parameters: the second fails where a parameter of the first got no gradient."""
    subject = subject_of(variant)
    seq = subject.sequence(2, 25)
    plain, _ = subject.memory(seq)
    wanted = gradients([plain], subject.parameters)
    parallel = nn.parallel.DistributedDataParallel(subject.memory)
    for _ in range(2):
        subject.memory.zero_grad()
        out, _ = parallel(seq)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)).sum().backward()
        assert_close(out, plain)
        grads = {f"memory.{name}": p.grad for name, p in subject.memory.named_parameters()}
        assert_same_gradients(grads, wanted)


def compiled_agrees(variant, backend, fullgraph):
    torch.compiler.reset()
    subject = subject_of(variant)
    seq = subject.sequence(1, 6).requires_grad_()
    memory = partial(subject) if subject.earlier is not None else subject.memory
    leaves = subject.parameters | {"seq": seq}
    plain = memory(seq)[0]
    compiled = torch.compile(lambda x: memory(x)[0], backend=backend, fullgraph=fullgraph)(seq)
    assert_close(compiled, plain, limit_of(variant))
    assert_same_gradients(gradients([compiled], leaves), gradients([plain], leaves))


def test_torch_compile():
    """In one graph."""
    compiled_agrees("mlp model", "aot_eager", fullgraph=True)


def compilations(options, lengths, backend) -> int:
    """How often a memory is compiled for sequences of these lengths, all of which agree with it uncompiled."""
    torch.compiler.reset()
    subject = Subject(PLAIN | options, dtype=torch.float64)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(lambda x: subject.memory(x)[0], backend=counter, fullgraph=True, dynamic=True)
    for n in lengths:
        seq = subject.sequence(2, n)
        assert_close(compiled(seq), subject.memory(seq)[0])
    return counter.frame_count


def test_torch_compile_does_not_repeat_itself():
    """One graph for all lengths of whole chunks that fit into a window (another number of windows is another graph)."""
    assert compilations({"chunk_size": 4}, (40, 48, 64), "eager") == 1


@pytest.mark.slow
@each_variant
def test_torch_compile_of_all(variant):
    compiled_agrees(variant, "aot_eager", fullgraph=False)
