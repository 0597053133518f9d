"""Reading one token at a time, as sampling does: the numbers of the models' own calls at a fraction of their cost."""
