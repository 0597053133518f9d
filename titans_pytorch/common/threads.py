"""CPU threads of a program, by one rule for all of them (docs/threads.md).

Importing this package, and building a model in a script of one's own, leave torch's number of threads alone.
"""

import os
from functools import cache

__all__ = ["NARROW", "choose_threads"]

NARROW = 256  # features of a token below which one thread is used


def choose_threads(asked: int | None, width: int | None) -> int:
    """Set torch's threads for a program, and return how many there are.

    Args:
        asked: the number that the user gave (--threads); 0 or None: by the width.
        width: features of a token of the model, or of the widest one. Below NARROW one thread is used. Otherwise, and
            where it is None or the environment has OMP_NUM_THREADS, torch chooses.
    """
    import torch

    own = _choice_of_torch()
    narrow = width is not None and width < NARROW and not os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(asked or (1 if narrow else own))
    return torch.get_num_threads()


@cache
def _choice_of_torch() -> int:
    """Torch's number before the first call: a narrow model does not decide for a wide one that follows it."""
    import torch

    return torch.get_num_threads()
