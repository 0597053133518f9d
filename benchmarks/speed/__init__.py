"""The parts of benchmark_speed.py: cases, what a worker does with them (arms.py, gate.py), measuring, reporting."""
