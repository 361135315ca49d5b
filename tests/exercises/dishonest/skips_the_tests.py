"""Raises what pytest raises for a skipped test.

ex03, stopped by: process
"""

import pytest


def __getattr__(name):
    return lambda *args, **kwargs: pytest.skip("not today")
