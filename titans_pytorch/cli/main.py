"""titans: train a model of the family, let it write, look at its memory, measure it.

titans train --config configs/mac.yaml     train on text or a task
titans sample RUN --prompt TEXT            let it write
titans analyze RUN                         what its memories do along a text: a picture and JSON
titans memory-check RUN                    do its memories change, and does that help?
titans eval RUN --length 512 4096          bits per byte, or a task's accuracy, at any lengths
titans search --config FILE --grid lr=...  train every combination of some settings

`titans COMMAND --help` says more.
"""

import sys
from collections.abc import Callable
from importlib import import_module

__all__ = ["analyze_main", "infer_main", "main", "train_main"]

COMMANDS = {
    "train": "train:train_command",
    "sample": "sample:sample_command",
    "analyze": "analyze:analyze_command",
    "memory-check": "memory_check:memory_check_command",
    "eval": "evaluate:evaluate_command",
    "search": "search:search_command",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command of `titans`.

    Args:
        argv: the command and its options; None: sys.argv.

    Returns:
        The exit status: 0, 1 after an error in one line, 2 after a mistake in the options.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        from titans_pytorch.training.config import nearest

        print(
            f"titans: unknown command {argv[0]}{nearest(argv[0], COMMANDS)}; titans --help lists all", file=sys.stderr
        )
        return 2
    return run_command(argv[0], argv[1:])


def run_command(name: str, argv: list[str]) -> int:
    from titans_pytorch.training.run import one_line

    module, _, function = COMMANDS[name].partition(":")
    command: Callable = getattr(import_module(f"titans_pytorch.cli.{module}"), function)
    return one_line(f"titans {name}", lambda: command(argv))


def train_main() -> int:
    """`titans-train`: the same as `titans train`."""
    return run_command("train", sys.argv[1:])


def infer_main() -> int:
    """`titans-infer`: the same as `titans sample`."""
    return run_command("sample", sys.argv[1:])


def analyze_main() -> int:
    """`titans-analyze`: the same as `titans analyze`."""
    return run_command("analyze", sys.argv[1:])
