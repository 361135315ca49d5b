"""Writes files without an end.

ex03, stopped by: process
"""

with open("bomb", "wb") as file:
    while True:
        file.write(b"0" * (1 << 20))
