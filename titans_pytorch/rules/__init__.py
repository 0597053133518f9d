"""Update rules: what a chunk of key-value pairs does to the fast weights. Start with base.py."""
