"""The benchmarks are scripts, run by path: their folder is where their imports begin."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
