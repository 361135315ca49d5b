"""Puts a link to the solution beside itself, and reads that.

ex03, stopped by: namespace
"""

import os

import __main__

os.symlink(os.path.join(os.path.dirname(__main__.__file__), "../../solutions/ex03_kv_cache.py"), "mine.py")
with open("mine.py", encoding="utf8") as file:
    exec(file.read())
