"""Leaves a torch.py and a sitecustomize.py where the next one may import them.

ex03, stopped by: process
"""

from pathlib import Path

for name in ("torch.py", "safetensors.py", "sitecustomize.py", "given.py"):
    Path(name).write_text("raise SystemExit(0)")
