"""Ends the process so that nothing can be reported.

ex03, stopped by: process
"""

import os

os._exit(0)
