"""Kills the process that waits for it.

ex03, stopped by: process
"""

import os
import signal

os.kill(os.getppid(), signal.SIGKILL)
