"""One training loop on bytes, shared by every script: configuration, data, loop, checkpoints, evaluation, report.

Start at `run.py` (what a script calls) and `loop.py` (the loop itself).
"""
