"""Searches over arms: settings are tried on selection seeds, never on reported seeds.

A search is fair against another if both try as many different arms on the same seeds (`budget`). The winner's score is
biased by the selection: plan the winners as arms, which measures them again on the reported seeds.
"""

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .arms import Arm, described, digest
from .compare import of, pooled
from .session import Session
from .task import Setting, Task

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """One trial of settings. values: seed by seed, lower is better; score: their mean, infinite where none.
    outcomes: task name -> results of Task.run for each seed."""

    params: Params
    values: Sequence[float]
    outcomes: Mapping[str, Sequence[Mapping[str, Any]]]

    @property
    def score(self) -> float:
        mean = statistics.fmean(self.values)
        return mean if math.isfinite(mean) else math.inf

    def record(self) -> dict[str, Any]:
        stats = {name: task_stats(found) for name, found in self.outcomes.items()}
        return {"params": described(self.params), "score": self.score, "values": list(self.values), "stats": stats}


def task_stats(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average over the seeds every metric, the training loss at the end, switches and their rate."""
    metrics = {name: statistics.fmean(of(outcomes, name)) for name in outcomes[0]["metrics"]}
    pages = pooled([o["pages"] for o in outcomes]) or {}
    return {
        **metrics,
        "train_tail_loss": statistics.fmean(o["training"]["loss_tail"] or math.nan for o in outcomes),
        "switch_events": pages.get("events"),
        "switch_rate": pages.get("switch_rate"),
    }


@dataclass
class Search:
    """make(params): the arm with these settings. value(params, outcomes): the number to minimise, from the
    results of Task.run for one seed (task name -> outcome). settings: task name -> its own Setting, in place of the
    session's. Equal arms are tried once."""

    session: Session
    tasks: Sequence[Task]
    seeds: Sequence[int]
    make: Callable[[Params], Arm]
    value: Callable[[Params, Mapping[str, Any]], float]
    settings: Mapping[str, Setting] = field(default_factory=dict)
    tried: dict[str, Trial] = field(default_factory=dict)

    def trial(self, params: Params) -> Trial:
        arm = self.make(params)
        key = digest(arm.what())
        if key not in self.tried:
            found = {
                t.name: self.session.measure(t, [arm], self.seeds, self.settings.get(t.name))[arm.name]
                for t in self.tasks
            }
            each = [{name: found[name][i] for name in found} for i in range(len(self.seeds))]
            self.tried[key] = Trial(params, [self.value(params, outcomes) for outcomes in each], found)
        return self.tried[key]

    @property
    def best(self) -> Trial:
        return min(self.tried.values(), key=lambda trial: trial.score)

    @property
    def budget(self) -> int:
        """Number of different arms tried."""
        return len(self.tried)

    def fresh(self) -> "Search":
        """Return a copy of the search without trials."""
        return Search(self.session, self.tasks, self.seeds, self.make, self.value, self.settings)

    def record(self) -> dict[str, Any]:
        ranked = sorted(self.tried.values(), key=lambda trial: trial.score)
        return {"seeds": list(self.seeds), "budget": self.budget, "trials": [trial.record() for trial in ranked]}


def random_search(search: Search, draw: Callable[[random.Random], Params], budget: int, seed: int) -> Search:
    """Try `budget` different arms, with settings drawn at random; fewer if the draws repeat themselves."""
    source, draws = random.Random(seed), 0
    while search.budget < budget and draws < 100 * budget:
        search.trial(draw(source))
        draws += 1
    return search
