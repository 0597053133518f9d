"""titans: train a model of the family, let it write, look at its memory, measure it.

titans train --config configs/mac.yaml     train on text or a task
titans sample RUN --prompt TEXT            let it write
titans analyze RUN                         what its memories do along a text: a picture and JSON
titans memory-check RUN                    do its memories change, and does that help?
titans eval RUN --length 512 4096          bits per byte, or a task's accuracy, at any lengths
titans search --config FILE --grid lr=...  train every combination of some settings

`titans COMMAND --help` says more; `titans --version` prints the versions.
"""

import sys
from collections.abc import Callable
from importlib import import_module

from titans_pytorch.cli.commands import (
    analyze_options,
    evaluate_options,
    list_settings,
    memory_check_options,
    sample_options,
)
from titans_pytorch.common.names import unknown
from titans_pytorch.common.version import version_line

__all__ = ["analyze_main", "infer_main", "main", "train_main"]

# name -> module and function of the work. It is imported after the options are read, and torch with it.
COMMANDS = {
    "train": "train:train_command",
    "sample": "sample:sample_command",
    "analyze": "analyze:analyze_command",
    "memory-check": "memory_check:memory_check_command",
    "eval": "evaluate:evaluate_command",
    "search": "search:search_command",
}

ASKED = {"-h", "--help", "--version"}
OPTIONS = {  # of the commands on a finished run; the others list the settings of a configuration
    "sample": sample_options,
    "analyze": analyze_options,
    "memory-check": memory_check_options,
    "eval": evaluate_options,
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
    if argv[0] == "--version":
        print(version_line())
        return 0
    if argv[0] not in COMMANDS:
        print(f"titans: {unknown('command ', argv[0], COMMANDS)}; titans --help lists all", file=sys.stderr)
        return 2
    return run_command(argv[0], argv[1:])


def run_command(name: str, argv: list[str]) -> int:
    given = OPTIONS[name]().parse_args(argv) if name in OPTIONS else argv
    if name not in OPTIONS and ASKED & set(argv):
        list_settings(name, argv)
    from titans_pytorch.training.run import one_line

    module, _, function = COMMANDS[name].partition(":")
    command: Callable = getattr(import_module(f"titans_pytorch.cli.{module}"), function)
    return one_line(f"titans {name}", lambda: command(given))


def train_main() -> int:
    """`titans-train`: the same as `titans train`."""
    return run_command("train", sys.argv[1:])


def infer_main() -> int:
    """`titans-infer`: the same as `titans sample`."""
    return run_command("sample", sys.argv[1:])


def analyze_main() -> int:
    """`titans-analyze`: the same as `titans analyze`."""
    return run_command("analyze", sys.argv[1:])
