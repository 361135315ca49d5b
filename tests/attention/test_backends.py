"""The one place where backends are chosen."""

from __future__ import annotations

import pytest
import torch

from minillm.attention import LOSES, get_backend
from minillm.errors import ConfigError


def test_every_backend_says_where_it_loses() -> None:
    assert set(LOSES) == {"auto", "naive", "tiled", "sdpa", "triton"}
    assert all(sentence.endswith(".") for sentence in LOSES.values())


def test_a_name_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'flash' is no backend. Choose one of: auto, naive, tiled, sdpa, triton"):
        get_backend("flash", "cpu")


def test_triton_on_a_cpu_is_refused_with_a_way_out() -> None:
    pytest.importorskip("triton")
    with pytest.raises(
        ConfigError, match=r"cannot run on a cpu device. Choose attention='auto', or set TRITON_INTERPRET"
    ):
        get_backend("triton", torch.device("cpu"))
