"""One run of a benchmark: every task, arm and seed once, finished results kept."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tqdm import tqdm

from .arms import Arm, controls_of, digest
from .compare import summary
from .store import Finished
from .task import Setting, Task

NAIVE = Arm("naive", {}, "a plain memory of one head", controls=False)


@dataclass
class Session:
    """What a runner's plan may use: `measure` runs arms on a task, on any seeds, `compare` judges them.

    seeds: of the reported results; `selection_seeds` are others, to choose settings on.
    """

    seeds: Sequence[int]
    setting: Setting
    finished: Finished = field(default_factory=lambda: Finished(None))
    code: str | None = None  # what version of the program results belong to
    progress: bool = True

    def selection_seeds(self, count: int) -> list[int]:
        """Seeds that no result is reported on."""
        first = 1_000_000 + (self.seeds[0] if self.seeds else 0) * 1000
        return [first + i for i in range(count)]

    def measure(
        self, task: Task, arms: Sequence[Arm], seeds: Sequence[int] | None = None, setting: Setting | None = None
    ) -> dict[str, list[dict[str, Any]]]:
        """Arm name -> what Task.run returns for each seed. Arms that differ in name alone are run once."""
        names = [arm.name for arm in arms]
        if len(set(names)) < len(names):
            raise ValueError(f"arms must be names that differ, got {names}")
        seeds, setting = self.seeds if seeds is None else seeds, setting or self.setting
        # a seed at a time: an interrupted run has whole seeds
        cells = [(seed, arm) for seed in seeds for arm in arms]
        out: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
        with tqdm(
            cells, desc=task.name, unit="run", leave=False, file=sys.stderr, disable=None if self.progress else True
        ) as bar:
            for seed, arm in bar:
                bar.set_postfix_str(f"seed {seed}, {arm.name}")
                out[arm.name].append(self.cell(task, arm, seed, setting))
        return out

    def cell(self, task: Task, arm: Arm, seed: int, setting: Setting) -> dict[str, Any]:
        key = self.key(task, arm, seed, setting)
        return self.finished[key] if key in self.finished else self.finished.add(key, task.run(arm, seed, setting))

    def key(self, task: Task, arm: Arm, seed: int, setting: Setting) -> str:
        return digest({"task": task, "arm": arm.what(), "seed": seed, "setting": asdict(setting), "code": self.code})

    def constants(self, task: Task, setting: Setting | None = None) -> list[dict[str, float]]:
        """What always giving the same answer, learned on training data, gets: seed by seed."""
        out, setting = [], setting or self.setting
        for seed in self.seeds:
            train = list(task.batches(seed, "train", max(1, min(setting.steps, 16))))
            test = list(task.batches(seed, "test", setting.test_batches))
            out.append({k: float(v) for k, v in task.constant(train, test).items()})
        return out

    def compare(self, task: Task, arms: Sequence[Arm], setting: Setting | None = None) -> dict[str, Any]:
        """Runs the arms and their controls, and judges each arm against its own."""
        everything = with_controls(arms)
        naive = [] if task.forgetting is None else [NAIVE]
        outcomes = self.measure(task, [*everything, *naive], setting=setting)
        return summary(task, everything, outcomes, self.constants(task, setting), outcomes.get(NAIVE.name))

    def times(self, task: Task, arms: Sequence[Arm], repeats: int) -> dict[str, dict[str, float]]:
        """Arm name -> what Task.times gives; never kept from one run to the next."""
        if repeats < 1:
            return {}
        return {arm.name: task.times(arm, self.seeds[0], self.setting, repeats) for arm in arms}


def with_controls(arms: Sequence[Arm]) -> list[Arm]:
    """Each arm, followed by its controls."""
    return [each for arm in arms for each in (arm, *controls_of(arm))]
