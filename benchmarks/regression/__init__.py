"""The parts of check_regression.py."""
