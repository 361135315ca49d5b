"""A learner's formats of the KV cache (exercise 12) in the engine's place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillm.course.use.beside import Beside, known
from minillm.quantization.cache import QuantizedCache
from minillm.quantization.formats import Int4, PerToken8, pack, unpack

if TYPE_CHECKING:
    from minillm.llm import LLM

ROUNDING = 1e-6


@dataclass(frozen=True)
class LearnerCodec:
    """Codes by a learner. The ends of ranges stay the engine's: it stores them in 16 bits, rounded outwards."""

    by_block: bool
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

    def wrap(ours: PerToken8) -> LearnerCodec:
        def encode(x: Tensor) -> tuple[Tensor, ...]:
            codes, scale = ours.encode(x)
            return quantize.check(codes, x.float(), scale.float()[..., None]), scale

        def decode(codes: Tensor, scale: Tensor) -> Tensor:
            out: Tensor = dequantize.check(ours.decode(codes, scale), codes, scale.float())
            return out

        return LearnerCodec(False, encode, decode)

    return _wrap_all(llm, lambda codec: getattr(codec, "dtype", None) == torch.int8, wrap, "kv_format='int8'")


def put_fp8(module: Any, llm: LLM) -> str | None:
    """Keys and values are rounded by the learner before they are stored in fp8."""
    rounding = Beside("ex12 round_fp8", module.round_fp8, known)

    def wrap(ours: PerToken8) -> LearnerCodec:
        def encode(x: Tensor) -> tuple[Tensor, ...]:
            codes, scale = ours.encode(x)
            width = scale.float().where(scale > 0, 1.0)[..., None]
            return rounding.check(codes.float(), x.float() * ours.largest / width).to(codes.dtype), scale

        return LearnerCodec(False, encode, ours.decode)

    return _wrap_all(llm, lambda codec: getattr(codec, "dtype", None) == torch.float8_e4m3fn, wrap, "kv_format='fp8'")


def put_int4(module: Any, llm: LLM) -> str | None:
    """Keys and values are stored in the learner's 4 bits and unpacked by the learner."""

    def codes_of(x: Tensor, low: Tensor, high: Tensor, dim: int) -> Tensor:
        """With the stored ends of the range as two more numbers, codes are in its units."""
        levels = module.quantize_int4(torch.cat([x, low, high], dim), dim)[0]
        codes: Tensor = module.pack_int4(levels.narrow(dim, 0, x.shape[dim]))
        return codes

    quantize = Beside("ex12 quantize_int4 and pack_int4", codes_of, known)
    unpack_int4 = Beside("ex12 unpack_int4", module.unpack_int4, unpack)

    def wrap(ours: Int4) -> LearnerCodec:
        def encode(x: Tensor) -> tuple[Tensor, ...]:
            codes, *ends = ours.encode(x)
            low, high = (end.float().unsqueeze(ours.dim) for end in ends)
            return quantize.check(codes, x.float(), low, high, ours.dim), *ends

        def decode(codes: Tensor, *ends: Tensor) -> Tensor:
            return ours.decode(pack(unpack_int4(codes)), *ends)

        return LearnerCodec(ours.by_block, encode, decode)

    return _wrap_all(llm, lambda codec: isinstance(codec, Int4), wrap, "kv_format='int4'")


def _wrap_all(llm: LLM, kind: Callable[[Any], bool], wrap: Callable[[Any], LearnerCodec], wanted: str) -> str | None:
    """Wrap every codec of the cache that is of this kind."""
    cache = llm.engine.runner.cache
    pools = cache.keys + cache.values if isinstance(cache, QuantizedCache) else []
    pools = [pool for pool in pools if kind(pool.codec)]
    for pool in pools:
        pool.codec = wrap(pool.codec)
    return None if pools else f"the cache has another format; see {wanted}"
