"""The memory's keywords for gates, kinetics and pages: checks, and the stages made from them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from titans_pytorch.common.checks import Words, callable_or_none, positive_int, threshold_or_none, wrong
from titans_pytorch.gates import checks
from titans_pytorch.gates.decay import DecayGate, DmdScore, GateScore, MeanScore, context_of
from titans_pytorch.gates.kinetics import Kinetics
from titans_pytorch.gates.limits import FEWEST, FixedLimit, QuantileLimit
from titans_pytorch.gates.pages import CallWindows, FixedWindows, Pages
from titans_pytorch.gates.paging import HierarchicalRouter, KeyedRouter, SequentialRouter
from titans_pytorch.gates.stages import Stage
from titans_pytorch.gates.symplectic import SymplecticGating

DMD_WINDOW = 16  # tokens, unless a chunk is longer
BUDGET_WINDOW = 64


@dataclass(frozen=True)
class GateConfig:
    """The keywords of NeuralMemory that concern gates, kinetics and pages. heads: heads of one page."""

    dim: int
    heads: int
    store_chunk: int
    max_step: float
    use_symplectic_gating: bool
    symplectic_gate: nn.Module | None
    symplectic_gate_kwargs: Mapping | None
    use_dmd_gating: bool
    dmd_window: int | None
    combine_symplectic_and_dmd: bool
    kinetics_coupling: bool
    kinetics_mix: float
    kinetics_eps: float
    num_pages: int
    symplectic_page_threshold: float | None
    page_threshold_quantile: float | None
    page_threshold_window: int
    page_switch_every: int | None
    page_router: Callable | None
    manifold_state_keyed_paging: bool
    hierarchical_paging: bool
    coarse_pages: int | None
    fine_pages: int | None
    hierarchy_mix: float
    read_active_page_only: bool

    @property
    def gated(self) -> bool:
        return self.use_symplectic_gating or self.use_dmd_gating

    @property
    def threshold(self) -> float:
        """The complexity above which a row switches pages."""
        if self.symplectic_page_threshold is not None:
            return self.symplectic_page_threshold
        return 0.4 if self.use_dmd_gating else 0.5

    def __post_init__(self):
        self._check()

    def stages(self) -> tuple[Stage, ...]:
        """Return the stages in order: the gate changes the forget gate, kinetics changes learning rate and forget gate,
        pages select the heads to write.
        """
        router = self._router()
        stages: list[Stage] = []
        if self.gated:
            stages.append(DecayGate(self._score(self.num_pages > 1 and getattr(router, "uses_phase", False))))
        if self.kinetics_coupling and self.kinetics_mix > 0:
            stages.append(Kinetics(self.kinetics_mix, self.kinetics_eps, self.max_step))
        if self.num_pages > 1:
            every, quantile = self.page_switch_every, self.page_threshold_quantile
            windows = CallWindows() if every is None else FixedWindows(every // self.store_chunk)
            limit = FixedLimit() if quantile is None else QuantileLimit(quantile, self.page_threshold_window)
            stages.append(Pages(self.num_pages, self.heads, router, limit, windows))
        return tuple(stages)

    def gate(self) -> nn.Module | None:
        """Return `symplectic_gate`: the user's, or a SymplecticGating whose budget, if any, has a window."""
        if not self.use_symplectic_gating:
            return None
        if self.symplectic_gate is not None:
            return self.symplectic_gate
        kwargs = dict(self.symplectic_gate_kwargs or {})
        if kwargs.get("budget_topk_ratio") is not None and kwargs.get("budget_window") is None:
            kwargs["budget_window"] = max(BUDGET_WINDOW, self.store_chunk)
        try:
            return SymplecticGating(self.dim, **kwargs)
        except TypeError as error:  # a keyword it does not have
            raise wrong("symplectic_gate_kwargs", kwargs, f"keywords of SymplecticGating ({error})") from error

    def scale(self, used: bool) -> nn.Parameter | None:
        return nn.Parameter(torch.tensor(0.5)) if used else None

    def _score(self, phase: bool):
        gate, dmd = GateScore(phase), DmdScore(self.dmd_window or max(DMD_WINDOW, self.store_chunk))
        if self.use_symplectic_gating and self.use_dmd_gating:
            return MeanScore(gate, dmd)
        return gate if self.use_symplectic_gating else dmd

    def _router(self):
        if self.page_router is not None:
            return self.page_router
        if self.hierarchical_paging:
            return HierarchicalRouter(*self._hierarchy(), self.hierarchy_mix)
        return KeyedRouter(self.num_pages) if self.manifold_state_keyed_paging else SequentialRouter(self.num_pages)

    def _hierarchy(self) -> tuple[int, int]:
        """Return the numbers of coarse and fine pages. By default one coarse page, as in the fork."""
        pages, coarse, fine = self.num_pages, self.coarse_pages, self.fine_pages
        if coarse is None:
            coarse = 1 if fine is None else pages // fine
        fine = pages // coarse if fine is None else fine
        if coarse * fine != pages:
            got = Words(f"{self.coarse_pages} with fine_pages {self.fine_pages}")
            raise wrong("coarse_pages", got, f"coarse_pages x fine_pages equal to num_pages, {pages}")
        return coarse, fine

    def _check(self):
        positive_int(self.num_pages, "num_pages")
        for name in ("coarse_pages", "fine_pages", "dmd_window", "page_switch_every"):
            if getattr(self, name) is not None:
                positive_int(getattr(self, name), name)
        for name in ("kinetics_mix", "hierarchy_mix"):
            checks.fraction(name, getattr(self, name))
        checks.positive("kinetics_eps", self.kinetics_eps)
        limit = threshold_or_none(self.symplectic_page_threshold, "symplectic_page_threshold")
        if limit is not None and math.isnan(limit):
            raise wrong("symplectic_page_threshold", limit, "a number or None")
        callable_or_none(self.page_router, "page_router")
        if self.page_threshold_quantile is not None:
            checks.fraction("page_threshold_quantile", self.page_threshold_quantile)
        if positive_int(self.page_threshold_window, "page_threshold_window") < FEWEST:
            takes = f"at least {FEWEST}, the complexities that a quantile is taken of"
            raise wrong("page_threshold_window", self.page_threshold_window, takes)
        if self.dmd_window is not None and self.dmd_window < 2:
            raise wrong("dmd_window", self.dmd_window, "at least the two tokens of a step, or None")
        if self.page_switch_every is not None and self.page_switch_every % self.store_chunk:
            takes = f"a multiple of the store chunk size, {self.store_chunk}"
            raise wrong("page_switch_every", self.page_switch_every, takes)
        if self.use_symplectic_gating and self.use_dmd_gating and not self.combine_symplectic_and_dmd:
            raise ValueError("use_symplectic_gating with use_dmd_gating needs combine_symplectic_and_dmd=True")
        if self.num_pages > 1 and not self.gated:
            raise ValueError("num_pages > 1 needs use_symplectic_gating or use_dmd_gating")
        self._check_gate()

    def _check_gate(self):
        gate, kwargs = self.symplectic_gate, self.symplectic_gate_kwargs
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise wrong("symplectic_gate_kwargs", kwargs, "a mapping of SymplecticGating's keywords, or None")
        if gate is None:
            return
        if not isinstance(gate, nn.Module):
            raise wrong("symplectic_gate", gate, "a torch.nn.Module, tokens [b n d] -> complexity [b n 1], or None")
        if not self.use_symplectic_gating:
            raise ValueError("symplectic_gate needs use_symplectic_gating=True")
        if kwargs is not None:
            raise ValueError("symplectic_gate cannot be combined with symplectic_gate_kwargs")
        context_of(gate)
