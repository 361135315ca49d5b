"""Asks the garbage collector for every tensor in the process: one of them must be the answer.

ex03, stopped by: process
"""

import gc

import torch


def __getattr__(name):
    return lambda *args, **kwargs: [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)][-1:]
