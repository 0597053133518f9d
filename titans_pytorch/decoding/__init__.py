"""Decoding one token at a time, for sampling: the results of the models' own calls at a fraction of their cost."""
