"""The one place where backends are chosen."""

from __future__ import annotations

import pytest
import torch

from minillm.attention.paged import REFERENCE, choose_backend
from minillm.config import EngineConfig
from minillm.errors import ConfigError
from minillm.kernels.cpu.paged import BACKEND


def test_what_is_fastest_on_the_device_is_chosen_unless_the_definition_is_asked_for() -> None:
    assert choose_backend("auto", torch.device("cpu")) is BACKEND
    assert choose_backend("reference", torch.device("cpu")) is REFERENCE
    assert choose_backend("reference", torch.device("cuda")) is REFERENCE


def test_a_device_that_nobody_has_kernels_for_gets_the_definition() -> None:
    assert choose_backend("auto", torch.device("meta")) is REFERENCE


def test_a_name_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kernels='flash' is not possible: .*'auto'.*'reference'"):
        EngineConfig(kernels="flash")
