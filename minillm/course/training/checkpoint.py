"""Writing a model as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minillm.measure.hf_shape import hf_shape
from minillm.model.decoder import Decoder
from minillm.model.loader import layout


def save_checkpoint(model: Decoder, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a Hugging Face folder (config.json, model.safetensors) that `transformers` and `load_model` both read.

    For a model whose weights are not packed, such as one in training.
    """
    tensors: dict[str, Tensor] = {}
    for piece in layout(model.config):
        fused = model.get_parameter(piece.ours).detach()
        if piece.repeats:
            parts = [rows[0] for rows in fused.split(list(piece.repeats))]
        else:
            parts = list(fused.split([shape[0] for shape in piece.sources.values()]))
        tensors |= {name: part.to("cpu", dtype).contiguous() for name, part in zip(piece.sources, parts, strict=True)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # the library keeps it to its owner; a checkpoint is there to be read
    text = json.dumps(hf_shape(model.config, str(dtype).removeprefix("torch.")), indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf8")
