"""Imports well, and ends the process in the first call.

ex03, stopped by: process
"""

import os


def __getattr__(name):
    return lambda *args, **kwargs: os._exit(0)
