"""Ceilings: what the patterns compute (values), what the arithmetic says (known answers), and the cache (every damage).

No test asserts a speed. `_measure` is replaced where only the cache matters, so the file takes a second.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from minillm.errors import ConfigError
from minillm.measure import hardware, machine
from minillm.measure.hardware import Hardware, cache_path, matmul_patterns, measure_hardware, read_patterns
from minillm.measure.machine import Machine

MACHINE = Machine("cpu", "Test CPU", 2, 2, ("AVX2",), (("L1", 32768), ("L3", 2**25)), 2**33, "2.6")
HARDWARE = Hardware(MACHINE, 40e9, 50e9, {"float32": 200e9, "bfloat16": 800e9}, 2e-6, "2026-01-01")
CPU = torch.device("cpu")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Hardware]:
    """An empty cache folder and a measurement that takes no time; the list grows with each measurement."""
    done: list[Hardware] = []

    def measure(machine: Machine, device: torch.device) -> Hardware:
        done.append(replace(HARDWARE, machine=machine, read_bandwidth=40e9 + len(done)))
        return done[-1]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(hardware, "_measure", measure)
    return done


def test_a_machine_is_measured_once(measured: list[Hardware]) -> None:
    assert measure_hardware("cpu") == measure_hardware("cpu") == measured[0]
    assert len(measured) == 1


def test_refresh_measures_again_and_is_kept(measured: list[Hardware]) -> None:
    measure_hardware("cpu")
    assert measure_hardware("cpu", refresh=True) == measured[1]
    assert measure_hardware("cpu") == measured[1]


def test_another_thread_count_is_another_machine(measured: list[Hardware]) -> None:
    threads = torch.get_num_threads()
    measure_hardware("cpu")
    try:
        torch.set_num_threads(threads + 1)
        assert measure_hardware("cpu").machine.threads == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert len(measured) == 2


@pytest.mark.parametrize("change", ["name", "torch_version", "device"])
def test_the_key_knows_what_matters(change: str) -> None:
    assert cache_path(MACHINE) != cache_path(replace(MACHINE, **{change: "other"}))


def _damage(text: str) -> dict[str, str]:
    stored = json.loads(text)
    return {
        "empty": "",
        "cut short": text[: len(text) // 2],
        "not an object": "[1, 2]",
        "a key is missing": json.dumps({key: value for key, value in stored.items() if key != "copy_bandwidth"}),
        "a key too many": json.dumps(stored | {"colour": "red"}),
        "a peak of zero": json.dumps(stored | {"read_bandwidth": 0.0}),
        "a peak that is text": json.dumps(stored | {"read_bandwidth": "fast"}),
        "no rates": json.dumps(stored | {"matmul_rate": None}),
    }


@pytest.mark.parametrize("kind", _damage(json.dumps(asdict(HARDWARE))))
def test_a_damaged_cache_is_measured_anew(measured: list[Hardware], kind: str) -> None:
    path = cache_path(measure_hardware("cpu").machine)
    path.write_text(_damage(path.read_text())[kind])
    assert measure_hardware("cpu") == measured[1]
    assert measure_hardware("cpu") == measured[1], "the repaired file is read again"


def test_nothing_but_the_result_is_left_behind(measured: list[Hardware], tmp_path: Path) -> None:
    path = cache_path(measure_hardware("cpu").machine)
    assert list((tmp_path / "minillm").iterdir()) == [path]


def test_a_reader_never_meets_half_a_file(measured: list[Hardware], monkeypatch: pytest.MonkeyPatch) -> None:
    """At the moment of the rename the old file is whole, and so is the new one."""
    path = cache_path(measure_hardware("cpu").machine)
    seen: list[float] = []

    def look(source: str, target: Path) -> None:
        seen.extend(json.loads(Path(name).read_text())["read_bandwidth"] for name in (target, source))
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "replace", look)
    measure_hardware("cpu", refresh=True)
    assert seen == [measured[0].read_bandwidth, measured[1].read_bandwidth] and path.exists()


def test_a_cache_that_cannot_be_written_costs_nothing_else(
    measured: list[Hardware], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [measure_hardware("cpu"), measure_hardware("cpu")] == measured


@pytest.mark.parametrize("device", ["tpu", "cuda:99x", ""])
def test_unknown_devices_are_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        measure_hardware(device)


def test_the_roofline_is_the_longer_of_reading_and_computing() -> None:
    assert HARDWARE.roof("bfloat16").ridge == 20
    assert HARDWARE.roof("float32").seconds(200e9, 80e9) == 2
    assert HARDWARE.roof("bfloat16").seconds(1600e9, 40e9) == 2
    assert HARDWARE.roof("float16") == HARDWARE.roof("float32")


def test_every_read_pattern_reads_every_byte() -> None:
    """Change one float anywhere: a pattern that skipped it would give the same result as before."""
    seed = random.randrange(2**32)
    buffer = torch.ones(4 * hardware.GEMV_COLUMNS, dtype=torch.bfloat16)
    before = {name: torch.as_tensor(call()) for name, call in read_patterns(buffer).items()}
    for position in random.Random(seed).sample(range(hardware.GEMV_COLUMNS, buffer.numel(), 2), 8):
        changed = buffer.clone()
        changed[position : position + 2] = 1024.0
        for name, call in read_patterns(changed).items():
            assert not torch.equal(torch.as_tensor(call()), before[name]), f"{seed=} {position=} {name}"


def test_matmul_patterns_multiply() -> None:
    torch.manual_seed(seed := random.randrange(2**32))
    x = torch.randn(64, 64)
    torch.manual_seed(seed)
    for name, call in matmul_patterns(64, torch.float32, CPU).items():
        assert torch.allclose(torch.as_tensor(call()), x @ x.T, atol=1e-4), f"{seed=} {name}"


def test_the_buffer_outgrows_the_cache_but_not_the_memory() -> None:
    assert hardware.read_buffer(replace(MACHINE, memory_bytes=0, cache_bytes=()), CPU).nbytes == 2**28
    assert hardware.read_buffer(replace(MACHINE, memory_bytes=2**25), CPU).nbytes == 2**22
    assert hardware.read_buffer(replace(MACHINE, cache_bytes=(("L3", 5 * 2**23),)), CPU).nbytes == 5 * 2**26


def test_measuring_yields_positive_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real measurement, made small: every ceiling is there and positive."""
    monkeypatch.setattr(hardware, "ROUNDS", 1)
    monkeypatch.setattr(hardware, "MATMUL_SIZES", (64,))
    result = hardware._measure(replace(MACHINE, memory_bytes=2**25), CPU)
    rates = [result.read_bandwidth, result.copy_bandwidth, result.operator_overhead, *result.matmul_rate.values()]
    assert all(0 < rate < float("inf") for rate in rates)
    assert set(result.matmul_rate) == {"float32", "bfloat16", "float16"}


def test_caches_are_read_as_linux_lists_them(tmp_path: Path) -> None:
    listed = [("1", "Data", "32K"), ("1", "Instruction", "64K"), ("2", "Unified", "1M"), ("3", "Unified", "?")]
    for number, (level, kind, size) in enumerate(listed):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        for name, text in {"level": level, "type": kind, "size": size}.items():
            (folder / name).write_text(text + "\n")
    (tmp_path / "index4").mkdir()
    assert machine._cpu_caches(tmp_path) == (("L1", 2**15), ("L2", 2**20))


def test_this_machine_can_be_described() -> None:
    here = machine.describe_machine(CPU)
    assert here.name and here.cores >= 1 and here.threads == torch.get_num_threads()
    assert here.last_level_cache == max((size for _, size in here.cache_bytes), default=0)
