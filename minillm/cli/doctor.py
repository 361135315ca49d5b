"""`minillm doctor`: what this machine is, and the most that it can do."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from minillm.cli.console import Threads, facts, number, quantity, use_threads
from minillm.cli.screen import err, out

if TYPE_CHECKING:
    from minillm.measure.hardware import Hardware
    from minillm.measure.machine import Machine

PACKAGES = ("minillm-course", "torch", "transformers", "safetensors", "triton")
Fact = tuple[str, str, str]


def doctor(
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again, even if it was done before.")] = False,
    gpus: Annotated[bool, typer.Option("--gpus", help="Also show data sheets of GPUs, for planning.")] = False,
    threads: Threads = None,
) -> None:
    """Show versions, the processor, and the measured ceilings of this machine."""
    import torch

    from minillm.measure.hardware import measure_hardware

    use_threads(threads)
    out.print(
        facts("Versions", [("Python", platform.python_version()), *((name, _version(name)) for name in PACKAGES)])
    )
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        with err.waiting(f"Measuring {device}; kept for the next time …"):
            hardware = measure_hardware(device, refresh=refresh)
        out.print(facts("Processor" if device == "cpu" else "GPU", _machine(hardware.machine)))
        out.print(facts(f"Ceilings, measured on {hardware.measured_on}", _ceilings(hardware)))
    if gpus:
        out.print(_datasheets())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _machine(machine: Machine) -> list[Fact]:
    caches = ", ".join(f"{name} {_binary(size)}" for name, size in machine.cache_bytes)
    cpu = machine.device == "cpu"
    return [
        ("name", machine.name, ""),
        ("cores", str(machine.cores), f"threads in use: {machine.threads}" if cpu else "multiprocessors"),
        ("features", ", ".join(machine.features) or "none known", ""),
        ("auto dtype", _auto_dtype(machine.device), "unless you say otherwise"),
        ("caches", caches or "unknown", ""),
        ("memory", f"{machine.memory_bytes / 2**30:.0f} GiB", ""),
    ]


def _binary(size: int) -> str:
    """Bytes of a cache, in the unit that makers of processors use."""
    return f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB"


def _auto_dtype(device: str) -> str:
    import torch

    from minillm.measure.hardware import dtype_name
    from minillm.model.loader import choose_dtype

    return dtype_name(choose_dtype("auto", torch.device(device)))


def _ceilings(hardware: Hardware) -> list[Fact]:
    rows = [
        ("read", quantity(hardware.read_bandwidth, "B/s"), "limits decode: all weights, once per token"),
        ("copy", quantity(hardware.copy_bandwidth, "B/s"), "read and written added up"),
    ]
    for dtype, rate in hardware.matmul_rate.items():
        ridge = number(hardware.roof(dtype).ridge)
        rows.append((f"matmul {dtype}", quantity(rate, "FLOP/s"), f"ridge {ridge} FLOP/byte"))
    rows.append(("operator", quantity(hardware.operator_overhead, "s"), "overhead of one call from Python"))
    return rows


def _datasheets() -> Table:
    from minillm.measure.datasheets import DATASHEETS

    title = "GPUs by data sheet: promised, not measured"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False)
    for heading in ("GPU", "read", "bfloat16, dense", "memory", "ridge, FLOP/byte"):
        table.add_column(heading, justify="left" if heading == "GPU" else "right")
    for sheet in DATASHEETS:
        rate, memory = quantity(sheet.bfloat16_rate, "FLOP/s"), f"{sheet.memory_bytes / 1e9:.0f} GB"
        table.add_row(sheet.name, quantity(sheet.read_bandwidth, "B/s"), rate, memory, number(sheet.ridge))
    return table
