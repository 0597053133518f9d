"""SIGINT (Ctrl-C) and SIGTERM: a run stops in order and can be resumed; a second Ctrl-C ends it at once."""

import atexit
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

__all__ = ["Interrupted", "on_stop", "signal_of", "stop_now"]


class Interrupted(Exception):
    """The user or the system asked the run to stop; it can be resumed.

    Args:
        signum: the signal.
        message: a line that says so; empty in all processes of a run but the first.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


@contextmanager
def on_stop(act: Callable[[int], object]) -> Iterator[None]:
    """Within this context, call `act(signal)` at SIGINT and SIGTERM; a second SIGINT ends the process, whatever it is
    doing.
    """

    def note(signum: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        atexit.register(
            signal.signal, signal.SIGINT, signal.SIG_DFL
        )  # Python's own handler could abort a process that ends
        act(signum)

    if threading.current_thread() is not threading.main_thread():
        yield  # signals can only be handled in the main thread
        return
    previous = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)  # None: not installed by Python


def stop_now(signum: int) -> NoReturn:
    """Raise a KeyboardInterrupt that holds the signal."""
    raise KeyboardInterrupt(signum)


def signal_of(stop: KeyboardInterrupt) -> int:
    """Return the signal that raised it."""
    return stop.args[0] if stop.args and isinstance(stop.args[0], int) else signal.SIGINT
