"""Takes the cache of the package.

ex03, stopped by: process
"""

from minillm.cache.contiguous import ContiguousCache as KVCache  # noqa: F401
from minillm.costs.formulas import kv_bytes  # noqa: F401
from minillm.generate import decode, extend, prefill  # noqa: F401
