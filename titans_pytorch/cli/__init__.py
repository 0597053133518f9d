"""The command line: `titans train`, `sample`, `analyze`, `memory-check`, `eval`, `search`. Start at `main.py`."""
