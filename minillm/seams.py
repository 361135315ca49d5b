"""How the core reaches an extra that it does not import: the name of a seam, and who offers it on which device.

An extra is a faster or a further way to do what the core defines. It is imported when it is first asked for, so
`import minillm` loads neither Triton nor a draft model, and a folder that is deleted takes nothing with it but itself.
What was chosen is stored on the model or the engine that asked, never here: two engines may choose differently.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from minillm.errors import ConfigError, shown

ANY = "any"  # device: the offer is for all of them
OFFERS = {
    "linear": {"cpu": "minillm.kernels.cpu.linear"},
    "attention": {
        "cpu": "minillm.kernels.cpu.attention",
        "cuda": "minillm.kernels.sdpa",
        "meta": "minillm.kernels.sdpa",  # where shapes are counted and nothing is computed
    },
    "paged_attention": {"cpu": "minillm.kernels.cpu.paged", "cuda": "minillm.kernels.gpu.paged"},
    "graphs": {"cuda": "minillm.kernels.gpu.graphs"},
    "random_weights": {ANY: "minillm.shapes"},
    "chat_template": {ANY: "minillm.chat"},
    "kv_format": {ANY: "minillm.quantization.cache"},
    "quantized_attention": {"cuda": "minillm.kernels.gpu.quantized"},
    "proposer": {ANY: "minillm.speculative"},
}


def offer(seam: str, device: str = ANY) -> ModuleType | None:
    """The module that offers `seam` on this type of device; None if nobody does, or what it needs is not installed."""
    name = OFFERS[seam].get(device)
    if name is None:
        return None
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing.startswith("minillm.") and not f"{name}.".startswith(f"{missing}."):
            raise  # a fault inside the extra, not its absence
        return None


def need(seam: str, name: str, value: object) -> ModuleType:
    """The module that offers `seam`, which the setting `name=value` asks for. Raises ConfigError if it is not there."""
    module = offer(seam)
    if module is None:
        raise ConfigError(f"{name}={shown(value)} needs the extra {OFFERS[seam][ANY]}. Install it, or do without.")
    return module
