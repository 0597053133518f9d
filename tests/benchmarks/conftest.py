"""The benchmarks are scripts, run by path: their folder is where their imports begin."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "benchmarks"), str(HERE)]  # and helpers of these tests
