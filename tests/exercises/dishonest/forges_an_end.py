"""Says in the worker's name that the script ended well, again and again.

ex03, stopped by: process
"""

import json
import os
import struct

for fd in range(20):
    for nonce in range(40):
        head = json.dumps({"nonce": nonce, "ended": 0}).encode()
        try:
            os.write(fd, struct.pack("<II", len(head), 0) + head)
        except OSError:
            break
