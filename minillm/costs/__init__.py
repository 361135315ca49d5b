"""Closed forms: the FLOPs and bytes of a step, and the time that a machine needs for them at least."""
