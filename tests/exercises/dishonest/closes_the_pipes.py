"""Closes every file that it did not open.

ex03, stopped by: process
"""

import os

os.closerange(0, 100)
