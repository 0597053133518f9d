"""The laws for each rule that has a name, with nothing else drawn (tests/laws/test_memory_laws.py draws the rest)."""

import functools

import pytest
import torch

from titans_pytorch.memory.named.registry import NAMED

from ..helpers import gradients
from .rounding import Results, Rounding
from .subjects import AXES, Subject, allowed, as_named
from .test_memory_laws import carried, named, streamed

PLAIN = {name: values[0] for name, values in AXES}
N = 11
each_rule = pytest.mark.parametrize("name", NAMED)


@functools.cache
def options_of(name):
    options = as_named(PLAIN | {"heads": 2, "dim_head": 4}, name)
    assert allowed(options)
    return options


def mask_of(rows):
    return torch.rand(rows, N, generator=torch.Generator().manual_seed(2)) > 0.3


@each_rule
def test_causal(name):
    subject = Subject(options_of(name))
    seq, other = subject.sequence(2, N), subject.sequence(2, N, seed=9)
    for t in (0, 4, 9):
        changed = torch.cat((seq[:, : t + 1], other[:, t + 1 :]), dim=1)

        @torch.no_grad()
        def until_t(subject, seq, t=t):
            return Results({"retrieved": subject(seq)[0][:, : t + 1]})

        Rounding(subject, seq, until_t).check(until_t(subject, changed), until_t(subject, seq))


@each_rule
def test_split_invariant_with_gradients(name):
    """Down to single tokens, with a mask; the carried state too."""
    subject = Subject(options_of(name))
    seq, mask = subject.sequence(2, N).requires_grad_(), mask_of(2)

    def learned(subject, seq, cuts=()):
        values = streamed(subject, seq, cuts, mask).values
        return Results(values, gradients([values["retrieved"]], subject.parameters | {"seq": seq}))

    wanted, rounding = learned(subject, seq), Rounding(subject, seq, learned)
    for cuts in ([1, 2, 7], range(1, N)):
        rounding.check(learned(subject, seq, cuts), wanted)


@each_rule
def test_engines_agree(name):
    options = options_of(name)
    reference = Subject(options, "reference")
    seq, mask = reference.sequence(2, N).requires_grad_(), mask_of(2)

    def everything(subject, seq):
        out, states, surprises = subject(seq, mask=mask)
        values = {"retrieved": out} | named(surprises) | carried(states)
        values |= {f"updates {k}": value for k, value in states[1].updates.items()}
        final = [*states[1].states[0].values(), *states[1].states[1].values()]
        return Results(values, gradients([out, *surprises, *final], subject.parameters | {"seq": seq}))

    wanted, rounding = everything(reference, seq), Rounding(reference, seq, everything)
    for engine in ("auto",) if options["update_rule"] is not None else ("auto", "matrix", "dual"):
        rounding.check(everything(Subject(options, engine), seq), wanted, engine)


@each_rule
def test_rows_do_not_touch(name):
    subject = Subject(options_of(name))
    seq = subject.sequence(3, N)
    poisoned = seq.clone()
    poisoned[1] = float("nan")

    @torch.no_grad()
    def outer(subject, seq):
        out = subject(seq)[0]
        return Results({"first": out[0], "last": out[-1]})

    Rounding(subject, seq, outer).check(outer(subject, poisoned), outer(subject, seq))


@each_rule
@pytest.mark.parametrize("kind", ["zero", "constant", "padded"])
def test_degenerate_inputs_are_finite(name, kind):
    subject = Subject(options_of(name))
    seq = subject.sequence(2, N)
    seq = torch.zeros_like(seq) if kind == "zero" else seq[:, :1].repeat(1, N, 1) if kind == "constant" else seq
    if kind == "padded":
        seq[:, 5:] = 0.0
    out, _, surprises = subject(seq.requires_grad_())
    assert all(x.isfinite().all() for x in (out, *surprises))
    assert all(grad.isfinite().all() for grad in gradients([out], subject.parameters | {"seq": seq}).values())
