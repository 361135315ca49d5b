"""The shapes of well-known models with random weights, so that time and bytes can be measured without a download.

`load_model("random:qwen3-0.6b")` builds the real thing in everything but the numbers inside: right for time, memory
and FLOPs, wrong for quality, acceptance rates or quantisation error. Values are those of the published `config.json`
files (`shapes.json`); the exact parameter counts are tests. The loader asks for this at the seam "random_weights".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.config import ModelConfig
from minillm.errors import CheckpointError
from minillm.model.hf import model_config

SHAPES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf8"))


def named_shape(name: str) -> ModelConfig:
    """The config behind `random:<name>`. Raises CheckpointError for a name that is not in the list."""
    if name not in SHAPES:
        raise CheckpointError(f"No shape is called {name!r:.80}. Shapes: {', '.join(SHAPES)}.")
    return model_config(SHAPES[name])


@dataclass(frozen=True)
class RandomWeights:
    """Normal weights of the config's initial spread, ones for norms: right for time and bytes only."""

    config: ModelConfig
    dtype: torch.dtype
    generator: torch.Generator

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The next tensor: numbers depend on the order in which tensors are read."""
        if name.endswith("norm.weight"):
            return torch.ones(shape, device=self.generator.device)
        tensor = torch.empty(shape, dtype=self.dtype, device=self.generator.device)
        return tensor.normal_(0, self.config.initializer_range, generator=self.generator)


def draw(name: str, device: torch.device, dtype: torch.dtype, seed: int) -> tuple[ModelConfig, RandomWeights]:
    """What `assemble` needs for `random:<name>`: the shape, and weights drawn on the device from `seed`."""
    config = named_shape(name)
    return config, RandomWeights(config, dtype, torch.Generator(device).manual_seed(seed))
