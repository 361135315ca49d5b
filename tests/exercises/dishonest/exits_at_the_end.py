"""Turns every exit code into 0.

ex03, stopped by: process
"""

import atexit
import os

atexit.register(os._exit, 0)
