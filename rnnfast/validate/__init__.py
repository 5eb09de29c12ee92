"""``python -m rnnfast validate``: the kernels against float64, on the machine that it runs on.

The pieces: cases (recurrences), runs (a backend computes one; budget (ii) of :mod:`rnnfast.testing`
judges it), layers and sequences (a whole layer, and budget (i) beside PyTorch).
"""
