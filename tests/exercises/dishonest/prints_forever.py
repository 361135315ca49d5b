"""Fills the disk or the memory of whoever keeps its output.

ex03, stopped by: process
"""

while True:
    print("passed " * 1000)
