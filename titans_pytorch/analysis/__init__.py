"""What memories do while a model reads: traces along a text (`trace.py`), their picture, and whether they help."""
