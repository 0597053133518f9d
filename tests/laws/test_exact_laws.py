"""The laws of the solve form: what it writes in one triangular solve is what the sequential engine writes."""

from functools import partial

import hypothesis.strategies as st
import torch
from hypothesis import given

from titans_pytorch.engines.chunkwise import ChunkwiseEngine

from ..helpers import gradients
from .rounding import Results, Rounding
from .subjects import Subject, option_sets, store_chunk
from .test_memory_laws import _masks, carried, compare, lawful, named, splittable, streamed, turning

__all__ = ["compare"]  # a fixture

LINEAR = {
    "model": "linear",
    "mem_model_norm_add_residual": False,
    "store_memory_loss_fn": None,
    "max_grad_norm": None,
    "spectral_norm_surprises": False,
    "update_rule": None,
}


def cases(most: int = 21):
    """(options of a memory of one matrix, number of tokens)."""

    def of(options):
        fewest = turning(options)
        return st.tuples(st.just(options | LINEAR), st.integers(fewest, max(most, fewest)))

    return option_sets.flatmap(of)


class Solved:
    """Counts the windows that were solved."""

    def __init__(self, monkeypatch):
        self.count, solve = 0, ChunkwiseEngine.solve

        def counted(engine, *args):
            self.count += 1
            return solve(engine, *args)

        monkeypatch.setattr(ChunkwiseEngine, "solve", counted)


def solves(options, n: int) -> bool:
    """Whether a call of n tokens holds several mini-batches, whose errors a threshold does not decide."""
    decided = options["surprise_threshold"] is None or options["surprise_source"] == "prediction"
    batch = options["batch_chunks"]
    return decided and batch is not None and n // store_chunk(options) > batch


@lawful
@given(cases(), st.data())
def test_equals_the_sequential_engine(monkeypatch, compare, case, data):
    """Values, carried state, every entry, and gradients."""
    options, n = case
    reference, subject = Subject(options, "sequential"), Subject(options, "solve")
    seq, mask = reference.sequence(2, n).requires_grad_(), _masks(data, 2, n)

    def everything(subject, seq):
        out, states, surprises = subject(seq, mask=mask)
        values = {"retrieved": out} | named(surprises) | carried(states)
        values |= {f"updates {name}": value for name, value in states[1].updates.items()}
        final = [*states[1].states[0].values(), *states[1].states[1].values()]
        return Results(values, gradients([out, *surprises, *final], subject.parameters | {"seq": seq}))

    wanted = everything(reference, seq)
    with monkeypatch.context() as patch:
        solved = Solved(patch)
        got = everything(subject, seq)
    assert (solved.count > 0) == solves(options, n)
    compare(Rounding(reference, seq, everything), got, wanted)


@lawful
@given(cases(), st.data())
def test_ragged_cuts(compare, case, data):
    """Any way of cutting a sequence into calls, gradients through the carried state included."""
    options, n = case
    if not splittable(options):
        options = options | {"page_switch_chunks": 2}
    subject = Subject(options, "solve")
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1)) if n > 1 else st.just(set()), label="cuts"))
    seq, mask = subject.sequence(2, n).requires_grad_(), _masks(data, 2, n)

    def learned(subject, seq, cuts=()):
        values = streamed(subject, seq, cuts, mask).values
        return Results(values, gradients([values["retrieved"]], subject.parameters | {"seq": seq}))

    wanted = learned(subject, seq)
    compare(Rounding(subject, seq, learned), learned(subject, seq, cuts), wanted)


@lawful
@given(cases(), st.data())
def test_windows_of_any_length(monkeypatch, compare, case, data):
    """How many mini-batches a window holds changes rounding alone."""
    options, n = case
    subject = Subject(options, "solve")
    seq, mask = subject.sequence(2, n), _masks(data, 2, n)
    whole = torch.no_grad()(partial(streamed, mask=mask))
    wanted = whole(subject, seq)
    with monkeypatch.context() as patch:
        tokens = data.draw(st.integers(1, 12), label="tokens of a window")
        patch.setattr("titans_pytorch.engines.chunkwise.SOLVE_TOKENS", tokens)
        compare(Rounding(subject, seq, whole), whole(subject, seq), wanted)
