"""The laws of the memory, each over random sets of options with randomised parameters.

A longer search: HYPOTHESIS_EXAMPLES=500 python -m pytest tests/laws
"""

import os
from collections import Counter

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

from titans_pytorch.memory_state import ROWS

from ..helpers import assert_close, assert_same_gradients, assert_same_tensors, gradients
from .subjects import Subject, option_sets, paged, store_chunk, tolerance

lawful = settings(
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "40")),
    deadline=None,
    derandomize="HYPOTHESIS_EXAMPLES" not in os.environ,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,  # the fixture is meant to last over the examples
    ],
)


def cases(least: int = 1, most: int = 17):
    """(options, number of tokens); with pages enough tokens for some to be turned."""
    return option_sets.flatmap(
        lambda options: st.tuples(st.just(options), st.integers(max(least, turning(options)), steady(options, most)))
    )


def steady(options, most: int) -> int:
    """Orthogonalised updates, taken at weights that move, make a rounding error (or a change of the input by one) grow
    tenfold with every few moves of the anchor: up to how many tokens a comparison says something."""
    if not (options["spectral_norm_surprises"] and options["batch_chunks"]):
        return most
    return min(most, 4 * options["batch_chunks"] * store_chunk(options))


def turning(options) -> int:
    """From how many tokens on pages are likely to be turned."""
    if not paged(options):
        return 1
    return min(11, 10 if options["page_threshold_quantile"] is not None else 3 * store_chunk(options))


@pytest.fixture
def pages():
    """Counts the examples with pages; a law has been tested with pages only where enough of them turned one."""
    seen = Counter()

    def saw(options, subject):
        if paged(options):
            seen["paged"] += 1
            seen["turned"] += subject.switches > 0

    yield saw
    assert seen["turned"] >= 0.5 * seen["paged"], f"pages turned in {seen['turned']} of {seen['paged']} examples"


def _masks(data, batch, n):
    if not data.draw(st.booleans(), label="masked"):
        return None
    generator = torch.Generator().manual_seed(n)
    return torch.rand(batch, n, generator=generator) > 0.4


def splittable(options) -> bool:
    """With pages, windows of switches must not depend on the calls."""
    return not paged(options) or options["page_switch_chunks"] is not None


def assert_same_state(got, wanted, limit, what="state"):
    """All but updates."""

    def same_tensors(a, b, name):
        assert_same_tensors(a, b, limit, f"{what}: {name}")

    for mine, theirs in zip(got, wanted, strict=True):
        if theirs is None:
            assert mine is None
            continue
        assert mine.seq_index == theirs.seq_index
        same_tensors(mine.weights, theirs.weights, "anchor")
        same_tensors(mine.states[0], theirs.states[0], "memory")
        same_tensors(mine.states[1], theirs.states[1], "momentum")
        assert_close(mine.cache_store_segment, theirs.cache_store_segment, limit, f"{what}: waiting tokens")
        assert (mine.read_weights is None) == (theirs.read_weights is None)
        if theirs.read_weights is not None:
            same_tensors(mine.read_weights, theirs.read_weights, "read weights")
        for field in ROWS:
            a, b = getattr(mine, field), getattr(theirs, field)
            assert (a is None) == (b is None), field
            if b is not None:
                assert_close(a, b, limit, f"{what}: {field}")


@lawful
@given(cases(), st.data())
def test_causal(pages, case, data):
    """Law 1: what comes after position t changes nothing at or before t."""
    options, n = case
    subject = Subject(options)
    t = data.draw(st.integers(0, n - 1), label="t")
    seq = subject.sequence(2, n)
    mask = _masks(data, 2, n)
    other = seq.clone()
    other[..., t + 1 :, :] = subject.sequence(2, n, seed=9)[..., t + 1 :, :]
    with torch.no_grad():
        a, b = subject(seq, mask=mask)[0], subject(other, mask=mask)[0]
    pages(options, subject)
    assert_close(b[:, : t + 1], a[:, : t + 1], tolerance(options) * 1e-3)


@lawful
@given(cases(), st.data())
def test_split_invariant(pages, case, data):
    """Law 2: any way of cutting a sequence into calls gives the same outputs, surprises and carried state."""
    options, n = case
    assume(splittable(options))
    subject, limit = Subject(options), tolerance(options)
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1)) if n > 1 else st.just(set()), label="cuts"))
    seq, mask = subject.sequence(2, n), _masks(data, 2, n)
    with torch.no_grad():
        whole, state, surprises = subject(seq, mask=mask)
        switches = subject.switches
        parts, parts_state, parts_surprises = subject.pieces(seq, cuts, mask)
    pages(options, subject)
    assert subject.switches == 2 * switches
    assert_close(parts, whole, limit, "retrieved")
    for got, wanted in zip(parts_surprises, surprises, strict=True):
        assert_close(got, wanted, limit, "surprise")
    assert_same_state(parts_state, state, limit)


@lawful
@given(cases(2, 13))
def test_token_by_token(pages, case):
    """Law 2 at its finest cut, gradients through the carried state included."""
    options, n = case
    assume(splittable(options))
    subject, limit = Subject(options), tolerance(options)
    seq = subject.sequence(2, n)
    leaves = subject.parameters | {"seq": seq.requires_grad_()}
    whole, state, _ = subject(seq)
    pages(options, subject)
    tokens, tokens_state, _ = subject.pieces(seq, range(1, n))
    assert_close(tokens, whole, limit, "retrieved")
    assert_same_state(tokens_state, state, limit)
    assert_same_gradients(gradients([tokens], leaves), gradients([whole], leaves), limit * 10)


@lawful
@given(cases(), st.data())
def test_engines_agree(pages, case, data):
    """Law 5: values and gradients of every engine against the reference."""
    options, n = case
    reference, limit = Subject(options, "reference"), tolerance(options)
    seq, mask = reference.sequence(2, n), _masks(data, 2, n)
    engines = ["auto"]
    if options["model"] != "foreign":
        engines += ["matrix"] if options["spectral_norm_surprises"] else ["matrix", "dual"]
    leaves = reference.parameters | {"seq": seq.requires_grad_()}
    out, state, surprises = reference(seq, mask=mask)
    pages(options, reference)
    final = list(state[1].states[0].values()) + list(state[1].states[1].values())
    wanted = gradients([out, *surprises, *final], leaves)
    for engine in engines:
        subject = Subject(options, engine)
        leaves = subject.parameters | {"seq": seq}
        got, got_state, got_surprises = subject(seq, mask=mask)
        assert_close(got, out, limit, f"{engine} retrieved")
        assert_close(got_surprises[0], surprises[0], limit, f"{engine} loss")
        assert_same_state(got_state, state, limit, engine)
        assert subject.switches == reference.switches
        assert_same_tensors(got_state[1].updates, state[1].updates, limit, f"{engine} updates")
        final = list(got_state[1].states[0].values()) + list(got_state[1].states[1].values())
        assert_same_gradients(gradients([got, *got_surprises, *final], leaves), wanted, limit * 10, engine)


@lawful
@given(cases(1, 11))
def test_rows_do_not_touch(pages, case):
    """Law 6: a row's results are its own, whatever stands in the others."""
    options, n = case
    subject = Subject(options)
    seq = subject.sequence(3, n)
    poisoned = seq.clone()
    poisoned[..., 1, :, :] = float("nan")
    with torch.no_grad():
        clean = subject(seq)[0]
        pages(options, subject)
        dirty = subject(poisoned)[0]
        alone = subject(seq[..., 2:, :, :])[0]
    assert_close(dirty[[0, 2]], clean[[0, 2]], tolerance(options) * 1e-3)
    assert_close(alone, clean[2:], tolerance(options) * 1e-3)


@lawful
@given(cases(1, 11), st.sampled_from(["zero", "constant", "padded"]))
def test_degenerate_inputs_are_finite(case, kind):
    """Law 6: outputs and gradients of zero, constant and padded inputs are finite."""
    options, n = case
    subject = Subject(options)
    seq = subject.sequence(2, n)
    if kind == "zero":
        seq = torch.zeros_like(seq)
    elif kind == "constant":
        seq = seq[..., :1, :].expand_as(seq).clone()
    else:
        seq[..., n // 2 :, :] = 0.0
    leaves = subject.parameters | {"seq": seq.requires_grad_()}
    out, state, (loss, _) = subject(seq)
    assert out.isfinite().all()
    assert loss.isfinite().all()
    for name, grad in gradients([out], leaves).items():
        assert grad.isfinite().all(), name


@lawful
@given(option_sets)
def test_every_parameter_learns(options):
    """Every parameter that a configuration uses has a nonzero gradient for some input."""
    if options["model"] == "attention":  # among single tokens there is nothing to attend to
        assume(options["chunk_size"] != 1 and store_chunk(options) * options["num_kv_per_token"] > 2)
    subject = Subject(options)
    batch = options["batch_chunks"] or 2
    # a page that is written once has no momentum yet
    seq = subject.sequence(2, 4 * batch * 3 * options["num_pages"] + 1)
    out, state, _ = subject(seq)
    own = dict(subject.memory.named_parameters())
    grads = gradients([out], own)
    still = [name for name, grad in grads.items() if not (grad != 0).any()]
    assert not still, f"no gradient: {still}"


@pytest.mark.parametrize("chunk", [1, 4])
def test_finite_over_a_long_stream(chunk):
    """With norms on queries and keys and a small largest step the rule stays finite: 65,536 tokens here."""
    from titans_pytorch import NeuralMemory

    torch.manual_seed(0)
    memory = NeuralMemory(8, chunk, batch_size=64, qk_rmsnorm=True, default_step_transform_max_lr=0.1)
    state = None
    with torch.no_grad():
        for _ in range(16):
            out, state = memory(torch.randn(1, 4096, 8), state=state)
    assert state.seq_index == 65_536
    assert out.isfinite().all()
    assert all(v.isfinite().all() for v in state.states[0].values())
