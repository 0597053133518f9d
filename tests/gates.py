"""Memories whose complexity and pages follow the tokens themselves, for the tests."""

import torch
from torch import nn

from titans_pytorch import NeuralMemory, NeuralMemState
from titans_pytorch.gates.stages import GateCarry, Span

from .helpers import randomise

DIM = 6


class Told(nn.Module):
    """A gate that reads complexity off the tokens' first feature, and an angle off the second. Keeps what it saw."""

    def __init__(self, phase=False):
        super().__init__()
        self.phase, self.seen = phase, []

    def forward(self, tokens, return_manifold_state=False):
        self.seen.append(tokens)
        complexity = tokens[..., :1].clamp(0.0, 1.0)
        if not return_manifold_state:
            return complexity
        return complexity, ({"phase_angle": tokens[..., 1:2]} if self.phase else None)


def told_memory(chunk=2, pages=3, phase=False, **options):
    """A memory whose pages follow the tokens themselves."""
    memory = NeuralMemory(
        DIM,
        chunk,
        pre_rmsnorm=False,
        use_symplectic_gating=True,
        num_pages=pages,
        symplectic_gate=Told(phase),
        **options,
    )
    return randomise(memory.double(), 1, 0.2)


def told(complexities, angles=None, chunk=2):
    """[1 m*chunk d]: the first token of each chunk carries its complexity, every one its angle."""
    seq = torch.randn(1, len(complexities) * chunk, DIM, generator=torch.Generator().manual_seed(0)).double()
    seq[..., 0] = 0.0
    seq[0, ::chunk, 0] = torch.tensor(complexities, dtype=torch.float64)
    if angles is not None:
        seq[0, :, 1] = torch.tensor(angles, dtype=torch.float64).repeat_interleave(chunk)
    return seq


def pages_of(memory, seq, state=None):
    """The page that each chunk of a call is written to, from the steps: on the others they are zero."""
    _, _, (_, step) = memory(seq, state=state, return_surprises=True)
    step = step.unflatten(1, (memory.num_pages, memory.heads)).unflatten(-1, (-1, memory.store_chunk_size))
    written = (step != 0).any(dim=-1).all(dim=2)
    assert (written.sum(dim=1) == 1).all(), "one page for each chunk"
    return written.long().argmax(dim=1)


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def rates(memory, seq, state=None, first=0):
    """(as they would be without gates, as they are), of complete chunks from the given one on."""
    tokens = memory.chunk_views(seq).keys
    span = Span(tokens, memory.store_chunk_size, first, memory.mini_batch)
    before = memory.rates_of(tokens, with_residual=False)
    carry = memory.gates.start(GateCarry.of(state or NeuralMemState(0)), len(seq), seq.device)
    return before, memory.gates.decide(span, before, carry)
