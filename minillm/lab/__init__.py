"""Exercises and grading: what a learner writes is run in a process of its own and judged from outside.

from minillm.lab import check
check("ex03")                       # in a notebook: the same result as `minillm lab test ex03`
"""
