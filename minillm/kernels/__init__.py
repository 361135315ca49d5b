"""Faster ways to compute what the core defines, one package per kind of machine. Each is found through `minillm.seams`."""
