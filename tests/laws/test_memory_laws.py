"""The laws of the memory, each over random sets of options with randomised parameters.

A longer search: HYPOTHESIS_EXAMPLES=500 python -m pytest tests/laws
"""

import os
from collections import Counter
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

from titans_pytorch.gates.limits import FEWEST
from titans_pytorch.memory.state import ROWS
from titans_pytorch.rules.losses import DotProduct

from ..helpers import gradients
from .rounding import KIND, Results, Rounding
from .subjects import Subject, option_sets, paged, store_chunk

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

    def of(options):
        fewest = max(least, turning(options))
        return st.tuples(st.just(options), st.integers(fewest, max(most, fewest)))

    return option_sets.flatmap(of)


def turning(options) -> int:
    """From how many tokens on pages are likely to be turned."""
    if not paged(options):
        return 1
    return store_chunk(options) * (FEWEST + 2 if options["page_threshold_quantile"] is not None else 3)


@pytest.fixture
def pages():
    """Counts the examples with pages; a law has been tested with pages only where enough of them turned one."""
    seen = Counter()

    def saw(options, subject):
        if paged(options):
            seen["paged"] += 1
            seen["turned"] += subject.switches > 0

    yield saw
    assert seen["turned"] >= 0.8 * seen["paged"], f"pages turned in {seen['turned']} of {seen['paged']} examples"


def _masks(data, batch, n):
    if not data.draw(st.booleans(), label="masked"):
        return None
    generator = torch.Generator().manual_seed(n)
    return torch.rand(batch, n, generator=generator) > 0.4


def splittable(options) -> bool:
    """With pages, windows of switches must not depend on the calls."""
    return not paged(options) or options["page_switch_chunks"] is not None


def carried(states) -> dict:
    """What two memories carry on, by name: all but updates."""
    out = {}
    for which, state in zip(("earlier", "own"), states, strict=True):
        if state is None:
            continue
        mappings = {"anchor": state.weights, "memory": state.states[0], "momentum": state.states[1]}
        mappings["read weights"] = state.read_weights or {}
        out |= {f"{which} {what} {k}": v for what, tensors in mappings.items() for k, v in tensors.items()}
        fields = {name: getattr(state, name) for name in ("cache_store_segment", *ROWS)}
        out |= {f"{which} {name}": value for name, value in fields.items() if value is not None}
        out[f"{which} position"] = torch.tensor(state.seq_index)
    return out


def streamed(subject, seq, cuts=(), mask=None) -> Results:
    out, states, surprises = subject.pieces(seq, cuts, mask)
    return Results({"retrieved": out} | named(surprises) | carried(states))


def named(surprises) -> dict:
    """Loss and step, and a predictor's error where there is one."""
    return dict(zip(("loss", "step", "error"), surprises, strict=False))


@pytest.fixture
def compare():
    """compare(rounding, got, wanted): equal but for rounding. Examples so badly conditioned that this says little have
    to be few."""
    seen = []

    def compare(rounding, got, wanted, what=""):
        rounding.check(got, wanted, what)
        seen.append(rounding.kind)

    yield compare
    assert sum(seen) <= 0.02 * len(seen) + 1, f"bounds above {KIND:.0e} in {sum(seen)} of {len(seen)} comparisons"


@lawful
@given(cases(), st.data())
def test_causal(pages, compare, case, data):
    """Law 1: what comes after position t changes nothing at or before t."""
    options, n = case
    subject = Subject(options)
    t = data.draw(st.integers(0, n - 1), label="t")
    seq = subject.sequence(2, n)
    mask = _masks(data, 2, n)
    other = seq.clone()
    other[..., t + 1 :, :] = subject.sequence(2, n, seed=9)[..., t + 1 :, :]

    @torch.no_grad()
    def until_t(subject, seq):
        return Results({"retrieved": subject(seq, mask=mask)[0][:, : t + 1]})

    wanted = until_t(subject, seq)
    pages(options, subject)
    compare(Rounding(subject, seq, until_t), until_t(subject, other), wanted)


@lawful
@given(cases(), st.data())
def test_split_invariant(pages, compare, case, data):
    """Law 2: any way of cutting a sequence into calls gives the same outputs, surprises and carried state."""
    options, n = case
    assume(splittable(options))
    subject = Subject(options)
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1)) if n > 1 else st.just(set()), label="cuts"))
    seq, mask = subject.sequence(2, n), _masks(data, 2, n)
    whole = torch.no_grad()(partial(streamed, mask=mask))
    wanted = whole(subject, seq)
    pages(options, subject)
    switches = subject.switches
    parts = whole(subject, seq, cuts)
    assert subject.switches == 2 * switches
    compare(Rounding(subject, seq, whole), parts, wanted)


@lawful
@given(cases(2, 13))
def test_token_by_token(pages, compare, case):
    """Law 2 at its finest cut, gradients through the carried state included."""
    options, n = case
    assume(splittable(options))
    subject = Subject(options)
    seq = subject.sequence(2, n).requires_grad_()

    def learned(subject, seq, cuts=()):
        values = streamed(subject, seq, cuts).values
        return Results(values, gradients([values["retrieved"]], subject.parameters | {"seq": seq}))

    wanted = learned(subject, seq)
    pages(options, subject)
    compare(Rounding(subject, seq, learned), learned(subject, seq, range(1, n)), wanted)


@lawful
@given(cases(), st.data())
def test_engines_agree(pages, compare, case, data):
    """Law 5: values and gradients of every engine against the reference."""
    options, n = case
    reference = Subject(options, "reference")
    seq, mask = reference.sequence(2, n).requires_grad_(), _masks(data, 2, n)
    engines = ["auto"]
    if options["model"] != "foreign" and options["update_rule"] is None:
        engines += ["matrix"] if options["spectral_norm_surprises"] else ["matrix", "dual"]

    def everything(subject, seq):
        out, states, surprises = subject(seq, mask=mask)
        values = {"retrieved": out} | named(surprises) | carried(states)
        values |= {f"updates {name}": value for name, value in states[1].updates.items()}
        final = [*states[1].states[0].values(), *states[1].states[1].values()]
        return Results(values, gradients([out, *surprises, *final], subject.parameters | {"seq": seq}))

    wanted = everything(reference, seq)
    pages(options, reference)
    rounding, switches = Rounding(reference, seq, everything), reference.switches
    for engine in engines:
        subject = Subject(options, engine)
        compare(rounding, everything(subject, seq), wanted, engine)
        assert subject.switches == switches


@lawful
@given(cases(1, 11))
def test_rows_do_not_touch(pages, compare, case):
    """Law 6: a row's results are its own, whatever stands in the others."""
    options, n = case
    subject = Subject(options)
    seq = subject.sequence(3, n)
    poisoned = seq.clone()
    poisoned[..., 1, :, :] = float("nan")

    @torch.no_grad()
    def outer(subject, seq):
        out = subject(seq)[0]
        return Results({"first": out[0], "last": out[-1]})

    wanted = outer(subject, seq)
    pages(options, subject)
    rounding = Rounding(subject, seq, outer)
    compare(rounding, outer(subject, poisoned), wanted, "beside NaN")
    alone = outer(subject, seq[..., 2:, :, :]).values["last"]
    compare(rounding, Results(wanted.values | {"last": alone}), wanted, "alone")


@lawful
@given(cases(1, 11), st.sampled_from(["zero", "constant", "padded"]))
def test_degenerate_inputs_are_finite(case, kind):
    """Law 6: outputs and gradients of zero, constant and padded inputs are finite.

    Constant ones with small steps: with large ones a memory overshoots, more with each repetition, by any engine.
    """
    options, n = case
    small = {"default_step_transform_max_lr": 0.01, "adaptive_step_transform": None} if kind == "constant" else {}
    subject = Subject(options | small)
    seq = subject.sequence(2, n)
    if kind == "zero":
        seq = torch.zeros_like(seq)
    elif kind == "constant":
        seq = seq[..., :1, :].expand_as(seq).clone()
    else:
        seq[..., n // 2 :, :] = 0.0
    leaves = subject.parameters | {"seq": seq.requires_grad_()}
    out, state, surprises = subject(seq)
    assert out.isfinite().all()
    assert all(x.isfinite().all() for x in surprises)
    for name, grad in gradients([out], leaves).items():
        assert grad.isfinite().all(), name


@lawful
@given(option_sets)
def test_every_parameter_learns(options):
    """Every parameter that a configuration uses has a nonzero gradient for some input."""
    if options["model"] == "attention":  # among single tokens there is nothing to attend to
        assume(options["chunk_size"] != 1 and store_chunk(options) * options["num_kv_per_token"] > 2)
    if isinstance(options["store_memory_loss_fn"], DotProduct):  # of one matrix its gradient depends on no weights
        assume(not options["accept_weight_residual"])
    if options["surprise_threshold"] is not None:
        options = options | {"surprise_threshold": 0.01}  # what nothing exceeds, nothing learns from
    subject = Subject(options)
    batch = options["batch_chunks"] or 2
    # a page that is written once has no momentum yet
    seq = subject.sequence(2, 4 * batch * 3 * options["num_pages"] + 1)
    out, state, surprises = subject(seq)
    own = dict(subject.memory.named_parameters())
    grads = gradients([out, *surprises[2:]], own)  # a predictor learns from its own error alone
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
