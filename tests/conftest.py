"""Options of the test suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--workloads",
        type=int,
        default=500,
        help="random workloads for the engine, over all policies",
    )
