"""How far apart results may lie that are equal but for rounding.

One bound for every option would be far too kind to most: where orthogonalised updates are taken at weights that move, a
rounding error grows tenfold with every few moves, elsewhere it stays where it began. So results have to agree to
EXACT, or to SLACK times what they change by when every number that goes in, input and parameter, goes to one of its
two neighbours. (Over random options the engines, and ways of cutting, came to at most 7 times that.)
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..helpers import gradient_errors, relative_error
from .subjects import Subject

EXACT, EXACT_GRADIENTS = 1e-11, 1e-10
SLACK = 100.0
KIND = 1e-6  # a bound above says little
SHAKES = 2


class Results(NamedTuple):
    """What a run gave, by name."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor] = {}


def differences(got: Results, wanted: Results) -> dict[str, float]:
    """Relative, by name."""
    assert set(got.values) == set(wanted.values), sorted(set(got.values) ^ set(wanted.values))
    values = {name: relative_error(got.values[name], value) for name, value in wanted.values.items()}
    return values | {f"gradient of {k}": v for k, v in gradient_errors(got.gradients, wanted.gradients).items()}


def shaken(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every number moved to the next one above or below."""
    to = torch.where(torch.rand(x.shape, generator=generator) < 0.5, torch.inf, -torch.inf)
    return torch.nextafter(x.detach(), to.to(x.dtype))


@dataclass
class Rounding:
    """The bounds for what `run` makes of a subject and its input."""

    subject: Subject
    seq: Tensor
    run: Callable[[Subject, Tensor], Results]
    kind: bool = field(default=False, init=False)  # a bound that says little had to be taken

    @cached_property
    def effect(self) -> dict[str, float]:
        """Of a change by one unit in the last place, the largest of some."""
        wanted = self.run(self.subject, self.seq)
        found: dict[str, float] = {}
        for seed in range(SHAKES):
            generator, twin = torch.Generator().manual_seed(seed), copy.deepcopy(self.subject)
            with torch.no_grad():
                for p in twin.parameters.values():
                    p.copy_(shaken(p, generator))
            got = self.run(twin, shaken(self.seq, generator).requires_grad_(self.seq.requires_grad))
            for name, change in differences(got, wanted).items():
                found[name] = max(change, found.get(name, 0.0))
        return found

    def check(self, got: Results, wanted: Results, what: str = ""):
        for name, error in differences(got, wanted).items():
            bound = EXACT_GRADIENTS if name.startswith("gradient") else EXACT
            if not error <= bound:  # only then is it worth while to see how much rounding can do
                bound = SLACK * self.effect[name]
                self.kind = self.kind or bound > KIND
            assert error <= bound, f"{what} {name}: relative error {error:.1e}, of rounding at most {bound:.0e}"
