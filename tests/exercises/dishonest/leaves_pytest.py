"""Asks pytest to stop with an exit code of 0.

ex03, stopped by: process
"""

import pytest


def __getattr__(name):
    return lambda *args, **kwargs: pytest.exit("done", returncode=0)
