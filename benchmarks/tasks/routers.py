"""Gates that select a page, for arms of experiments.

Letters: b batch, n tokens, p pages, w tokens seen together, d features.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from titans_pytorch import NeuralMemory

SHARPNESS = 8.0  # of a recogniser: factor of its learning speed relative to the memory, at the same learning rate


class Told(nn.Module):
    """An oracle: it is given the page of the current task. Every chunk may switch to it (complexity 0, so that the
    forget gate stays unchanged; the threshold must lie below)."""

    context, causal = 0, True

    def __init__(self, pages: int):
        super().__init__()
        self.pages, self.page = pages, 0

    def forward(self, tokens: Tensor, return_manifold_state: bool = False):
        complexity = tokens.new_zeros(*tokens.shape[:2], 1)
        if not return_manifold_state:
            return complexity
        return complexity, {"phase_angle": torch.full_like(complexity, middle(self.page, self.pages))}


class Recogniser(nn.Module):
    """Recognises contexts: a linear map of the last w tokens to p + 1 logits, "nothing known" and one for each page.
    Complexity is the probability of the latter, the angle the likeliest page's.

    In training it gets labels: the page of the current task, and how many tokens of a call are context; `lesson` is its
    loss. In tests it gets none.
    """

    causal = True

    def __init__(self, dim: int, pages: int, window: int = 4):
        super().__init__()
        self.pages, self.window, self.context = pages, window, window - 1
        self.map = nn.Linear(window * dim, pages + 1)
        self.page, self.silent, self.lessons = 0, 0, []

    def forward(self, tokens: Tensor, return_manifold_state: bool = False):
        seen = nn.functional.pad(tokens, (0, 0, self.context, 0)).unfold(1, self.window, 1)
        logits = SHARPNESS * self.map(seen.flatten(2))
        if self.training and torch.is_grad_enabled():
            self.learn(logits)
        complexity = 1 - logits.softmax(dim=-1)[..., :1]
        if not return_manifold_state:
            return complexity
        page = logits[..., 1:].argmax(dim=-1, keepdim=True)
        return complexity, {"phase_angle": middle(page.to(tokens.dtype), self.pages)}

    def learn(self, logits: Tensor) -> None:
        """Add the loss of logits [b n p+1] of one call's tokens, which follow earlier ones, if any."""
        n = self.silent + self.pairs
        logits = logits[:, self.context - n :]  # the first tokens also see tokens before the context
        wanted = logits.new_zeros(logits.shape[:2], dtype=torch.long)
        wanted[:, : self.silent - self.context] = self.page + 1
        self.lessons.append(nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()))


def lesson(model: nn.Module, calls: list) -> Tensor:
    """The penalty of an arm with recognisers: their loss since the last step."""
    total = torch.zeros(())
    for module in model.modules():
        if isinstance(module, Recogniser) and module.lessons:
            total = total + sum(module.lessons) / len(module.lessons)
            module.lessons = []
    return total


def middle(page, pages: int):
    """Return the angle in the middle of a page's arc of the circle."""
    return (page + 0.5) * (2 * math.pi / pages) - math.pi


def told_memory(**keywords: Any) -> NeuralMemory:
    """Build a memory whose pages are selected by `tell`."""
    return routed(Told(keywords["num_pages"]), {"symplectic_page_threshold": -1.0, **keywords})


def recognising_memory(**keywords: Any) -> NeuralMemory:
    """Build a memory that switches pages where a context is recognised."""
    return routed(Recogniser(keywords["dim"], keywords["num_pages"]), {"symplectic_page_threshold": 0.9, **keywords})


def routed(gate: nn.Module, keywords: Mapping[str, Any]) -> NeuralMemory:
    own = {"use_symplectic_gating": True, "symplectic_gate": gate, "manifold_state_keyed_paging": True}
    return NeuralMemory(**{**keywords, **own})


def tell(model: nn.Module, page: int, silent: int = 0, pairs: int = 0) -> None:
    """Announce the next write or read: the task's page, the number of context tokens, and the number that follow.
    Oracles switch to the page; recognisers use it as a label, in training alone."""
    for module in model.modules():
        if isinstance(module, Told):
            module.page = page % module.pages
        elif isinstance(module, Recogniser):
            module.page, module.silent, module.pairs = page % module.pages, silent, pairs
