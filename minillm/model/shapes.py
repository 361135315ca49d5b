"""The shapes of well-known models, so that their time and bytes can be measured without their weights.

`load_model("random:qwen3-0.6b")` builds the real thing in everything but the numbers inside: right for time, memory
and FLOPs, wrong for quality, acceptance rates or quantisation error. Values are those of the published `config.json`
files (`shapes.json`); the exact parameter counts are tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minillm.config import ModelConfig
from minillm.errors import CheckpointError
from minillm.model.hf import model_config

SHAPES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf8"))


def named_shape(name: str) -> ModelConfig:
    """The config behind `random:<name>`."""
    if name not in SHAPES:
        raise CheckpointError(f"No shape is called {name!r:.80}. Shapes: {', '.join(SHAPES)}.")
    return model_config(SHAPES[name])
