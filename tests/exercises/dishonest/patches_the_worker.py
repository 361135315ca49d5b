"""Replaces the worker's own function that packs values.

ex03, stopped by: process
"""

import __main__

__main__.pack = lambda value, tensors, other: True
__main__._take = lambda step, things, tensors, sent, values: sent.append(True)
