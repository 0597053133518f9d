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
    """A run, as a runner's plan sees it: `measure` runs arms on a task, on any seeds, `compare` judges them.

    seeds: the reported seeds; `selection_seeds` are others, to choose settings on.
    """

    seeds: Sequence[int]
    setting: Setting
    finished: Finished = field(default_factory=lambda: Finished(None))
    code: str | None = None  # version of the program that made the results
    progress: bool = True

    def selection_seeds(self, count: int) -> list[int]:
        """Return seeds on which no result is reported."""
        first = 1_000_000 + (self.seeds[0] if self.seeds else 0) * 1000
        return [first + i for i in range(count)]

    def measure(
        self, task: Task, arms: Sequence[Arm], seeds: Sequence[int] | None = None, setting: Setting | None = None
    ) -> dict[str, list[dict[str, Any]]]:
        """Run arms on a task: arm name -> results of Task.run for each seed. Arms that differ only in name are
        run once.
        """
        names = [arm.name for arm in arms]
        if len(set(names)) < len(names):
            raise ValueError(f"arms must be names that differ, got {names}")
        seeds, setting = self.seeds if seeds is None else seeds, setting or self.setting
        # seed by seed, so that an interrupted run has complete seeds
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
        """Measure the best constant prediction, learned on training data, seed by seed."""
        out, setting = [], setting or self.setting
        for seed in self.seeds:
            train = list(task.batches(seed, "train", max(1, min(setting.steps, 16))))
            test = list(task.batches(seed, "test", setting.test_batches))
            out.append({k: float(v) for k, v in task.constant(train, test).items()})
        return out

    def compare(self, task: Task, arms: Sequence[Arm], setting: Setting | None = None) -> dict[str, Any]:
        """Run the arms and their controls, and judge each arm against its own."""
        everything = with_controls(arms)
        naive = [] if task.forgetting is None else [NAIVE]
        outcomes = self.measure(task, [*everything, *naive], setting=setting)
        return summary(task, everything, outcomes, self.constants(task, setting), outcomes.get(NAIVE.name))

    def times(self, task: Task, arms: Sequence[Arm], repeats: int) -> dict[str, dict[str, float]]:
        """Time the arms: arm name -> results of Task.times. They are never kept for another run."""
        if repeats < 1:
            return {}
        return {arm.name: task.times(arm, self.seeds[0], self.setting, repeats) for arm in arms}


def with_controls(arms: Sequence[Arm]) -> list[Arm]:
    """Return each arm, followed by its controls."""
    return [each for arm in arms for each in (arm, *controls_of(arm))]
