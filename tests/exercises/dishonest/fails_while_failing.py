"""Raises an error that raises an error when somebody asks what it is.

ex03, stopped by: process
"""


class Slippery(BaseException):
    def __str__(self):
        raise self

    __repr__ = __str__


def __getattr__(name):
    raise Slippery
