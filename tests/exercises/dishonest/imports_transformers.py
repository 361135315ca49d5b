"""Takes the cache of another package.

ex03, stopped by: process
"""

from transformers import DynamicCache as KVCache  # noqa: F401
