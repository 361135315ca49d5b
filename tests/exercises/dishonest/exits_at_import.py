"""Leaves before anybody looks: an exit code of 0 is a success, is it not?

ex03, stopped by: process
"""

import sys

sys.exit(0)
