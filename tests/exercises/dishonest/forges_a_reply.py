"""Writes a reply of its own into every pipe it finds.

ex03, stopped by: process
"""

import json
import os
import struct

for fd in range(20):
    for nonce in range(40):
        head = json.dumps({"nonce": nonce, "sent": [True] * 20, "status": "passed", "points": 99}).encode()
        try:
            os.write(fd, struct.pack("<II", len(head), 0) + head)
        except OSError:
            break
os._exit(0)
