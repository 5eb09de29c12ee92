"""``python -m rnnfast validate``: the kernels against float64, on the machine that it runs on.

The pieces: cases (recurrences) and runs (a backend computes one, and :mod:`rnnfast.testing` judges
it); layers and sequences (whole layers beside PyTorch); kernels, modules and large (what is checked
of a backend); plan (which rows there are), rows, table, picture and command. A new option is one
line in kernels.GROUPS, a new dtype one in plan.ARITHMETICS; a new backend is judged as it is.
"""
