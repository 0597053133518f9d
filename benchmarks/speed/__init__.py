"""The parts of benchmark_speed.py: cases, the work of a worker (arms.py, gate.py), measuring, reporting."""
