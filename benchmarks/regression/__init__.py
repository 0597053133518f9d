"""What check_regression.py is made of."""
