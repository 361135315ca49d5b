"""Attention: one definition, and the places where a faster one is chosen.

`reference` is the textbook, `tiled` the online softmax, `paged` the definition over blocks. What is faster on a kind of
machine stands in `minillm.kernels` and must give the same result up to rounding.
"""
