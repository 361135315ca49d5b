"""Looks for secrets in variables, its own and those of every process it can see.

ex03, stopped by: namespace
"""

import os
from pathlib import Path

secrets = dict(os.environ)
for path in Path("/proc").glob("[0-9]*/environ"):
    try:
        secrets |= dict(line.split("=", 1) for line in path.read_text().split("\0") if "=" in line)
    except OSError:
        continue
course = next(Path(value) for value in secrets.values() if Path(value, "solutions").is_dir())
exec((course / "solutions" / "ex03_kv_cache.py").read_text(encoding="utf8"))
