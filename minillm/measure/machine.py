"""What the system says about this machine: processor, cores, caches, features, memory. Read, not measured.

Everything here comes from the operating system or from torch; what cannot be found out is empty or zero, never guessed.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

# Names in /proc/cpuinfo -> names that people use. x86 calls the line "flags", Arm calls it "Features".
FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx512_bf16": "AVX512_BF16",
    "avx512_fp16": "AVX512_FP16",
    "avx512_vnni": "AVX512_VNNI",
    "amx_tile": "AMX",
    "amx_bf16": "AMX_BF16",
    "amx_fp16": "AMX_FP16",
    "asimdhp": "NEON_FP16",
    "bf16": "NEON_BF16",
    "sve": "SVE",
}


@dataclass(frozen=True)
class Machine:
    """The device that a measurement belongs to. Two Machines that are equal share their measurements."""

    device: str  # "cpu" or "cuda"
    name: str
    cores: int  # logical processors this process may use; multiprocessors of a GPU
    threads: int  # torch's threads; they decide what a CPU reaches
    features: tuple[str, ...]
    cache_bytes: tuple[tuple[str, int], ...]  # ("L3", 33554432), …; data caches, smallest first
    memory_bytes: int
    torch_version: str

    @property
    def last_level_cache(self) -> int:
        """Bytes of the largest cache, 0 if unknown. What should come from memory must be several times larger."""
        return max((size for _, size in self.cache_bytes), default=0)


def describe_machine(device: torch.device) -> Machine:
    """The Machine of a torch device of type "cpu" or "cuda"."""
    return _cuda_machine(device) if device.type == "cuda" else _cpu_machine()


def _cpu_machine() -> Machine:
    return Machine(
        device="cpu",
        name=_cpuinfo("model name") or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        features=_cpu_features(),
        cache_bytes=_cpu_caches(Path("/sys/devices/system/cpu/cpu0/cache")),
        memory_bytes=_memory_bytes(),
        torch_version=torch.__version__,
    )


def _cuda_machine(device: torch.device) -> Machine:
    properties = torch.cuda.get_device_properties(device)
    return Machine(
        device="cuda",
        name=properties.name,
        cores=properties.multi_processor_count,
        threads=torch.get_num_threads(),
        features=(f"compute capability {properties.major}.{properties.minor}",),
        cache_bytes=(("L2", getattr(properties, "L2_cache_size", 0)),),
        memory_bytes=properties.total_memory,
        torch_version=torch.__version__,
    )


def _cpuinfo(key: str) -> str:
    """The first value of a key of /proc/cpuinfo; empty where there is no such file (macOS, Windows)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _cpu_features() -> tuple[str, ...]:
    """The features above that this CPU has; elsewhere than on Linux torch's one word for it ("AVX2", "DEFAULT")."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    if not flags:
        return (torch.backends.cpu.get_cpu_capability(),)
    return tuple(name for flag, name in FEATURES.items() if flag in flags)


def _cpu_caches(folder: Path) -> tuple[tuple[str, int], ...]:
    """Name and bytes of each cache that holds data, as Linux lists them in index0, index1, … of `folder`."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    caches = []
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction" and size[-1:] in units:
            caches.append((f"L{level}", int(size[:-1]) * units[size[-1]]))
    return tuple(caches)


def _memory_bytes() -> int:
    """Physical memory in bytes; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
