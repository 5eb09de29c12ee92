"""``python -m rnnfast validate`` judges the kernels of this machine against float64.

The pieces: cases (recurrences) and runs (a backend computes one, and :mod:`rnnfast.testing` judges
it); layers and sequences (whole layers beside PyTorch); kernels, modules and large (the checks of a
backend); plan (the rows), rows, table, picture and command. A new option is one line in
kernels.GROUPS, a new dtype is one line in plan.ARITHMETICS, and a new backend needs no change.
"""
