"""Takes memory until something gives.

ex03, stopped by: process
"""

import torch

hoard = []
while True:
    hoard.append(torch.ones(1 << 24))
