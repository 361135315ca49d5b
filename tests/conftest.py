"""Options of the test suite."""

from __future__ import annotations

import os

import pytest

# Before anything imports PyTorch: tests run in one process per core, and two processes whose threads wait for each
# other by spinning take many times as long as two that compute with one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--workloads",
        type=int,
        default=500,
        help="random workloads for the engine, over all policies",
    )
    parser.addoption("--submissions", type=int, default=8, help="size of the class that the grader's test grades")
    parser.addoption("--interrupts", type=int, default=60, help="interrupts at random lines of the engine")
    parser.addoption("--calls", type=int, default=300, help="random calls of LLM.generate, right and wrong ones")
    parser.addoption("--damages", type=int, default=300, help="learners' files that are damaged at random")
