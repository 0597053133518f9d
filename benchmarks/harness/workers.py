"""A worker: a separate process that serves requests, one line of JSON each way, and may fail without harm.

The parent sends {"do": ..., ...} and waits at most so long for {"ok": ...} or {"error": {"kind", "message"}}. Whatever
happens to the process, the parent gets a WorkerFailure of one kind: "failed", "out of memory", "timeout", "killed".
"""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")


class WorkerFailure(Exception):
    """kind: "failed", "out of memory", "timeout" or "killed"."""

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind, self.message = kind, message


class Worker:
    """Runs `command`; `ask` sends a request. The process ends with the context."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None, cwd: str | Path | None = None):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process, closed with it
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=env, cwd=cwd
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: Mapping[str, Any], timeout: float) -> Any:
        """Return the worker's response within `timeout` seconds; otherwise WorkerFailure. A timeout ends the worker."""
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._gone() from None
        try:
            line = self._lines.get(timeout=max(timeout, 0.0))
        except queue.Empty:
            self.close()
            raise WorkerFailure("timeout", f"no answer within the {timeout:.3g} s that were left") from None
        if line is None:
            raise self._gone()
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailure(**answer["error"])
        return answer["ok"]

    def _gone(self) -> WorkerFailure:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return WorkerFailure("out of memory", "the system killed the process")
        if code < 0:
            return WorkerFailure("killed", signal.Signals(-code).name)
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
        return WorkerFailure("failed", f"exit status {code}" + "".join(f", {line}" for line in last))

    def close(self) -> None:
        if self.alive:
            self._process.kill()
        self._process.wait()
        self._errors.close()
        self._process.stdout.close()
        with suppress(OSError):  # nobody reads what was left unsent
            self._process.stdin.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_):
        self.close()


class Budget:
    """The seconds that remain for a piece of work."""

    def __init__(self, seconds: float):
        self.left = seconds

    def ask(self, worker: Worker, request: Mapping[str, Any]) -> Any:
        if self.left <= 0:
            raise WorkerFailure("timeout", "no time left")
        began = time.monotonic()
        try:
            return worker.ask(request, self.left)
        finally:
            self.left -= time.monotonic() - began


def serve(handlers: Callable[[dict], Any]) -> None:
    """Serve requests from stdin until it closes (the worker's side). Other output goes to stderr."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        try:
            answer = {"ok": handlers(json.loads(line))}
        except Exception as error:  # any error is reported to the parent
            answer = {"error": describe_error(error)}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


def describe_error(error: Exception) -> dict[str, str]:
    text = str(error)
    lacking = isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY)
    first = (text.strip().splitlines() or [""])[0]
    return {
        "kind": "out of memory" if lacking else "failed",
        "message": f"{type(error).__name__}: {first}"[:300],
    }
