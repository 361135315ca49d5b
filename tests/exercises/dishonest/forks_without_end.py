"""Starts processes until there is no room for any.

ex03, stopped by: namespace
"""

import os

while True:
    os.fork()
