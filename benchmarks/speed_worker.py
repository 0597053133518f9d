"""One arm of benchmark_speed.py in a process of its own; started by it, with the Python of the arm's environment.

Serves requests (harness/workers.py) about one case. In the peer's environment it needs only torch and titans_pytorch.
"""

import gc
import platform
from importlib import metadata

import torch
from harness.resident import Watermark, limit_memory
from harness.timing import matmul_rate, timed_calls
from harness.workers import serve
from speed import gate
from speed.arms import Setup, subject, tiny


class Arm:
    """One method for each request; its keywords are the request's fields."""

    def start(self, case: dict, setup: dict, threads: int | None, memory_limit: int | None) -> dict:
        limit_memory(memory_limit)
        if threads is not None:
            torch.set_num_threads(threads)
        self.case, self.setup = case, Setup(**setup)
        torch.empty(1, device=self.setup.device)  # fails now if there is no such device
        self.subject = None
        import titans_pytorch

        return {
            "package": metadata.version("titans-pytorch"),
            "is_ours": hasattr(titans_pytorch, "load_peer_state_dict"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        }

    def write_answer(self, **request) -> None:
        gate.write_answer(self.case, self.setup, **request)

    def compare_with_peer(self, path: str) -> dict:
        return gate.compare_with_peer(self.case, self.setup, path)

    def compare_with_reference(self, **request) -> dict:
        return gate.compare_with_reference(self.case, self.setup, **request)

    def prepare(self, what: str) -> None:
        """Build the module and run `what` once, so that work of the first use is not timed."""
        self._build()
        if what == "decode":
            self.subject.prepare_decode()
        getattr(self.subject, what)()

    def time(self, what: str, min_seconds: float) -> dict:
        calls = timed_calls(getattr(self.subject, what), self.setup.device, min_seconds, self.setup.clock)
        return {"calls": calls, "tokens": self.subject.decoded_tokens if what == "decode" else None}

    def memory(self) -> dict:
        """Measure the memory of one training step over idle, with module and inputs built and code loaded."""
        subject(tiny(self.case), self.setup).train()
        self._build()
        gc.collect()
        mark = Watermark(self.setup.device)
        self.subject.train()
        return mark.read()

    def matmul(self, side: int) -> float:
        return matmul_rate(self.setup.device, self.setup.dtype, side, clock=self.setup.clock)

    def engines(self) -> list[str]:
        """Return the engine that each memory of our library chose."""
        self._build()
        found = (getattr(module, "engine", None) for module in self.subject.module.modules())
        return [type(engine).__name__ for engine in found if engine is not None]

    def _build(self):
        if self.subject is None:
            self.subject = subject(self.case, self.setup)


def main():
    arm = Arm()
    serve(lambda request: getattr(arm, request.pop("do"))(**request))


if __name__ == "__main__":
    main()
