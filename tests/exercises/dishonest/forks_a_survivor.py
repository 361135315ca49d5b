"""Leaves a process behind that has its own session, to rewrite results later.

ex03, stopped by: namespace
"""

import os
import time

if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execvp("sleep", ["sleep", "31536017"])
    os._exit(0)
time.sleep(0.2)
