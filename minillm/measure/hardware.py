"""This machine's ceilings, measured: bytes read and copied per second, FLOPs per second, the cost of one operator.

A bound is only as good as its peak. A data sheet promises more than programs reach, and a careless benchmark reports
less than they reach. So each ceiling here is the *best* of several ways to do the work and of many repeats: noise only
makes a repeat slower. The ways include the engine's own linear layer, so that the engine never beats the peak.

Measuring takes a few seconds, so the result is kept in the user's cache folder, one file per machine, thread count and
torch version.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from minillm.kernels.cpu.linear import pack
from minillm.measure.bench import interleaved
from minillm.measure.machine import Machine, describe_machine
from minillm.measure.roof import Roof
from minillm.model.linear import Linear
from minillm.model.loader import choose_device

ROUNDS = 12
MATMUL_SECONDS = 0.01  # in a product that takes this long, the time to start it no longer matters
MATMUL_SIZES = (512, 1024, 2048, 4096, 8192)
MATMUL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GEMV_COLUMNS = 2048


@dataclass(frozen=True)
class Hardware:
    """The measured ceilings of one machine."""

    machine: Machine
    read_bandwidth: float  # byte/s
    copy_bandwidth: float  # byte/s, read and written added up
    matmul_rate: dict[str, float]  # FLOP/s by dtype name; on CUDA float32 means float32, not TF32
    operator_overhead: float  # s for an operator on one number: launch cost on CUDA
    measured_on: str  # ISO date

    def roof(self, dtype: str) -> Roof:
        """What work in this dtype can reach at best: products in it where they were measured, else in float32."""
        return Roof(self.matmul_rate.get(dtype, self.matmul_rate["float32"]), self.read_bandwidth)


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32", "bfloat16", …: as in configs, tables and JSON."""
    return str(dtype).removeprefix("torch.")


def measure_hardware(device: str = "cpu", *, refresh: bool = False) -> Hardware:
    """The ceilings of `device` ("auto", "cpu", "cuda", "cuda:<n>"), from the cache if they were measured before.

    `refresh` measures again and overwrites the file; so does a damaged file. If the folder cannot be written, the next
    call measures again. Raises `ConfigError` for a device that is not here.
    """
    target = choose_device(device)
    machine = describe_machine(target)
    path = cache_path(machine)
    hardware = None if refresh else _read_cache(path, machine)
    if hardware is None:
        hardware = _measure(machine, target)
        _write_cache(path, hardware)
    return hardware


def _measure(machine: Machine, device: torch.device) -> Hardware:
    with torch.inference_mode():
        read, copy = _bandwidths(machine, device)
        return Hardware(
            machine=machine,
            read_bandwidth=read,
            copy_bandwidth=copy,
            matmul_rate={dtype_name(d): _matmul_rate(d, device) for d in MATMUL_DTYPES},
            operator_overhead=_operator_overhead(device),
            measured_on=date.today().isoformat(),
        )


def _bandwidths(machine: Machine, device: torch.device) -> tuple[float, float]:
    """(read, copy) in byte/s over a buffer that no cache holds."""
    buffer = read_buffer(machine, device)
    size, target = buffer.nbytes, torch.ones_like(buffer)
    best = _best_seconds(read_patterns(buffer) | {"copy": lambda: target.copy_(buffer)}, device)
    copy = best.pop("copy")
    return size / min(best.values()), 2 * size / copy


def read_patterns(buffer: Tensor) -> dict[str, Callable[[], object]]:
    """Ways to read every byte of a bf16 buffer once. Which is fastest depends on the machine, so all are tried.

    The last is decode itself: one row times a weight matrix as large as the buffer, through the engine's own layer.
    """
    floats, ints = buffer.view(torch.float32), buffer.view(torch.int64)
    layer, row = _layer(buffer.view(-1, GEMV_COLUMNS)), buffer[:GEMV_COLUMNS].view(1, -1)
    pack(layer)
    return {
        "read sum bf16": buffer.sum,
        "read sum int64": ints.sum,
        "read dot float32": lambda: torch.dot(floats, floats),
        "read linear bf16": lambda: layer(row),
    }


def read_buffer(machine: Machine, device: torch.device) -> Tensor:
    """A bf16 buffer to read: eight times the largest cache and long enough to time, at most an eighth of the memory.

    Filled with ones, because pages that were never written are not in memory, and reading them takes no time.
    """
    wanted = max(2**28 if device.type == "cpu" else 2**32, 8 * machine.last_level_cache)
    size = min(wanted, machine.memory_bytes // 8 or wanted)
    return torch.ones(size // (2 * GEMV_COLUMNS) * GEMV_COLUMNS, dtype=torch.bfloat16, device=device)


def _matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a square product; its size grows until one product takes long enough."""
    for size in MATMUL_SIZES:
        best = min(_best_seconds(matmul_patterns(size, dtype, device), device).values())
        if best >= MATMUL_SECONDS:
            break
    return 2 * size**3 / best


def matmul_size(rate: float) -> int:
    """The smallest size that keeps a machine of `rate` FLOP/s busy for long enough, or the largest there is."""
    return next((size for size in MATMUL_SIZES if 2 * size**3 >= rate * MATMUL_SECONDS), MATMUL_SIZES[-1])


def matmul_patterns(size: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], object]]:
    """Ways to multiply two square matrices, 2 size³ FLOPs each: the engine's linear layer, plain and packed."""
    x = torch.randn(size, size, device=device).to(dtype)
    plain, packed = _layer(x), _layer(x)
    pack(packed)
    return {"matmul plain": lambda: plain(x), "matmul packed": lambda: packed(x)}


def _layer(weight: Tensor) -> Linear:
    with torch.device("meta"):
        layer = Linear(weight.shape[1], weight.shape[0])
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def _operator_overhead(device: torch.device) -> float:
    """Seconds that the smallest operator takes when it is called from Python again and again."""
    number, calls = torch.zeros(1, device=device), 2000

    def many() -> None:
        for _ in range(calls):
            number.add_(1)

    sync = torch.cuda.synchronize if device.type == "cuda" else None
    return interleaved({"add": many}, repeats=5, sync=sync)["add"].per(calls).best


def _best_seconds(candidates: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """The fastest of `ROUNDS` turns of each. CUDA is timed by its own events, which leave out the launch."""
    if device.type == "cuda":
        return {name: min(_cuda_seconds(call) for _ in range(ROUNDS)) for name, call in candidates.items()}
    return {name: timing.best for name, timing in interleaved(candidates, repeats=ROUNDS, warmup=2).items()}


def _cuda_seconds(call: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def cache_path(machine: Machine) -> Path:
    """Where the measurements of this machine are kept: `$XDG_CACHE_HOME` or `~/.cache`, then `minillm/`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    key = hashlib.sha256(repr(machine).encode()).hexdigest()[:16]
    return Path(base) / "minillm" / f"hardware-{key}.json"


def _read_cache(path: Path, machine: Machine) -> Hardware | None:
    """The kept measurements; None if there are none, or if the file is damaged or of another version."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        hardware = Hardware(**(stored | {"machine": machine}))
        positive = [hardware.read_bandwidth, hardware.copy_bandwidth, *hardware.matmul_rate.values()]
        return hardware if all(value > 0 for value in positive) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _write_cache(path: Path, hardware: Hardware) -> None:
    """Write a second file, then rename it: a reader sees the old file or the new one, never half of one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(asdict(hardware), file, indent=1)
        os.replace(file.name, path)
    except OSError:
        return
