"""Finds the course from where the worker lies, and runs the solution.

ex03, stopped by: namespace
"""

from pathlib import Path

import __main__

course = Path(__main__.__file__).resolve().parents[2]
exec((course / "solutions" / "ex03_kv_cache.py").read_text(encoding="utf8"))
