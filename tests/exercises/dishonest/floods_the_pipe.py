"""Announces a message of four gigabytes and sends noise.

ex03, stopped by: process
"""

import os

while True:
    for fd in range(3, 20):
        try:
            os.write(fd, b"\xff" * 65536)
        except OSError:
            continue
