"""The command that starts this program again, as it can be typed: for hints."""

import os
import shlex
import shutil
import sys

__all__ = ["started_as"]


def started_as(program: str | None = None) -> str:
    """Return the beginning of the command line that started this process: everything before its arguments.

    This is a script after its interpreter, an installed command, or `python -m MODULE`; in several processes, torchrun.
    A program on PATH is given by its name, another one by its path from the current folder.

    Args:
        program: the path of the script; None: of the one that runs.
    """
    module = None if program else module_that_runs()
    program = program or sys.argv[0]
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if processes != "1":
        start = ["torchrun", "--nproc-per-node", processes]
    elif module or program.endswith(".py"):
        start = [typed(sys.executable)]
    else:
        start = []
    return shlex.join([*start, *(["-m", module] if module else [typed(program)])])


def module_that_runs() -> str | None:
    """Return the module that `python -m` runs, or None."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else None


def typed(file: str) -> str:
    """Return the name of `file` if PATH has it, else its path, relative if it is in the current folder.

    Links are not followed: the interpreter of a virtual environment is a link, and its place names the environment.
    """
    file = os.path.abspath(file)
    for name in ("python", os.path.basename(file)):
        found = shutil.which(name)
        if found and os.path.abspath(found) == file:
            return name
    here = os.path.relpath(file)
    return file if here.startswith(os.pardir) else here
