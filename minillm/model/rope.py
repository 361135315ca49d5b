"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864): a position is an angle.

Dimension pairs (i, i + head_dim/2) of a query or key are turned by position x frequency_i. The product of a query at
position a and a key at position b then depends on a - b alone, so keys can stay in the cache as they were written.
Angles are float32 whatever the model's dtype: bfloat16 cannot tell position 257 from 256.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.config import ModelConfig, RopeScaling


class Rotation(NamedTuple):
    """Cosines and signed sines for the tokens of one step, each [num_tokens, 1, head_dim] float32."""

    cos: Tensor
    sin: Tensor


def inverse_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Radians per position for each dimension pair, [head_dim / 2] float32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    return frequencies if config.rope_scaling is None else _stretch(frequencies, config.rope_scaling)


def _stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3's rule: slow the long wavelengths by `factor`, keep the short ones, blend between.

    A wavelength longer than the original context was never seen whole in training, so it must be stretched;
    a short one carries the local order of words and must not change.
    """
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths  # full turns within the original context
    blend = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rotation(positions: Tensor, config: ModelConfig) -> Rotation:
    """The turn of each token, for absolute positions [num_tokens] int64.

    Computed once per step and used by every layer; a table over all positions would be larger than it is useful, and
    one more thing to cast or to overrun. The first half of `sin` is negated, so that `rotate` needs one shifted copy
    of its input and no concatenation.
    """
    angles = positions[:, None, None].float() * inverse_frequencies(config, positions.device)
    sin = angles.sin()
    return Rotation(torch.cat([angles.cos()] * 2, dim=-1), torch.cat([-sin, sin], dim=-1))


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Turn each head of x [num_tokens, heads, head_dim] by its token's angle; float32 in, float32 out.

    (a, b) becomes (a cos - b sin, b cos + a sin), with a and b the two halves of a head (the layout of
    Hugging Face checkpoints; the paper interleaves the pairs instead).
    """
    return torch.addcmul(x * turn.cos, x.roll(x.shape[-1] // 2, dims=-1), turn.sin)
