"""A learner's formats of the KV cache (exercise 12) in the engine's place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillm.course.use.beside import Beside, known
from minillm.quantization.attention import prepare, quantized_attention
from minillm.quantization.cache import QuantizedCache
from minillm.quantization.formats import FORMATS, pack, unpack

if TYPE_CHECKING:
    from minillm.llm import LLM

ROUNDING = 1e-6


@dataclass(frozen=True)
class LearnerCodec:
    """Codes by a learner. The ends of ranges stay the engine's: it stores them in 16 bits, rounded outwards."""

    encode: Callable[[Tensor], tuple[Tensor, ...]]
    decode: Callable[..., Tensor]


def put_int8(module: Any, llm: LLM) -> str | None:
    """Keys and values are stored in the learner's 8 bits and read back by the learner."""

    def codes_of(x: Tensor, scale: Tensor) -> Tensor:
        """With the stored scale as one more number, which is then the largest, codes are in its units."""
        codes: Tensor = module.quantize_int8(torch.cat([x, scale], -1))[0]
        return codes[..., :-1]

    quantize = Beside("ex12 quantize_int8", codes_of, known)
    dequantize = Beside("ex12 dequantize_int8", module.dequantize_int8, known, ROUNDING)

    def wrap(ours: Any) -> LearnerCodec:
        def encode(x: Tensor) -> tuple[Tensor, ...]:
            codes, scale = ours.encode(x)
            return quantize.check(codes, x.float(), scale.float()[..., None]), scale

        def decode(codes: Tensor, scale: Tensor) -> Tensor:
            out: Tensor = dequantize.check(ours.decode(codes, scale), codes, scale.float())
            return out

        return LearnerCodec(encode, decode)

    return _wrap(llm, "int8", wrap)


def put_fp8(module: Any, llm: LLM) -> str | None:
    """Keys and values are rounded by the learner before they are stored in fp8."""
    rounding = Beside("ex12 round_fp8", module.round_fp8, known)

    def wrap(ours: Any) -> LearnerCodec:
        def encode(x: Tensor) -> tuple[Tensor, ...]:
            codes, scale = ours.encode(x)
            width = scale.float().where(scale > 0, 1.0)[..., None]
            return rounding.check(codes.float(), x.float() * ours.largest / width).to(codes.dtype), scale

        return LearnerCodec(encode, ours.decode)

    return _wrap(llm, "fp8", wrap)


def put_int4(module: Any, llm: LLM) -> str | None:
    """Keys and values are stored in the learner's 4 bits and unpacked by the learner."""

    def levels_of(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Of one group: with the stored ends of its range as two more numbers, levels are in its units."""
        levels: Tensor = module.quantize_int4(torch.cat([x, low, high], -1), -1)[0]
        return levels[..., :-2]

    def codes_of(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Group by group, along the channels that share a range."""
        groups = x.split(-(-x.shape[-1] // low.shape[-1]), -1)
        ends = low.split(1, -1), high.split(1, -1)
        codes: Tensor = module.pack_int4(torch.cat([levels_of(*one) for one in zip(groups, *ends, strict=True)], -1))
        return codes

    quantize = Beside("ex12 quantize_int4 and pack_int4", codes_of, known)
    unpack_int4 = Beside("ex12 unpack_int4", module.unpack_int4, unpack)

    def wrap(ours: Any) -> LearnerCodec:
        def encode(x: Tensor) -> tuple[Tensor, ...]:
            codes, low, high = ours.encode(x)
            return quantize.check(codes, x.float(), low.float(), high.float()), low, high

        def decode(codes: Tensor, *ends: Tensor) -> Tensor:
            out: Tensor = ours.decode(pack(unpack_int4(codes)), *ends)
            return out

        return LearnerCodec(encode, decode)

    return _wrap(llm, "int4", wrap)


def _wrap(llm: LLM, kv_format: str, wrap: Callable[[Any], LearnerCodec]) -> str | None:
    """Put the learner's codec in the cache's place of its own, to write and to read.

    It is read by the definition of attention, on a GPU too: kernels decode by themselves.
    """
    cache = llm.engine.runner.cache
    if not isinstance(cache, QuantizedCache) or cache.codec is not FORMATS[kv_format]:
        return f"the cache has another format; see kv_format={kv_format!r}"
    cache.codec = wrap(cache.codec)
    cache.prepare, cache.attention = prepare, partial(quantized_attention, decode=cache.codec.decode)
    return None
