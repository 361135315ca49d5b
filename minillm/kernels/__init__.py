"""Faster ways to compute what the core defines, one package per kind of machine; found through `minillm.seams`."""
