"""What benchmarks/attention.py measures: random prompts and decodes, and everything that can compute them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from minillm.attention.metadata import AttentionMetadata
from minillm.attention.paged import REFERENCE, Backend, choose_backend
from minillm.attention.reference import naive_attention
from minillm.attention.tiled import tiled_attention

BLOCK_SIZE = 16
COLD_BYTES = 2**28  # a decode walks through as many layers as hold this many bytes: more than any cache
CHECKED = 64  # of a prompt's last queries, against float32: all of them would need the whole score matrix
SHAPES = {"smollm2-135m": (9, 3, 64), "qwen3-0.6b": (16, 8, 128), "llama-3.1-8b": (32, 8, 128)}  # heads, KV heads, d
Call = Callable[[], Tensor]


def paged_backend(name: str, device: torch.device) -> Backend:
    """Attention over blocks: "reference" is the definition, "triton" the kernels of a GPU, "auto" this device's own."""
    if name == "triton":
        from minillm.kernels.gpu.paged import BACKEND

        return BACKEND
    return REFERENCE if name == "reference" else choose_backend("auto", device)


@dataclass(frozen=True)
class Prompt:
    """One prompt: q `[n, heads, d]`, k and v `[kv_heads, n, d]`."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def random(cls, shape: str, n: int, dtype: torch.dtype, device: torch.device) -> Prompt:
        heads, kv_heads, d = SHAPES[shape]
        q = torch.randn(n, heads, d, dtype=dtype, device=device)
        return cls(q, *torch.randn(2, kv_heads, n, d, dtype=dtype, device=device))

    @property
    def flops(self) -> int:
        """Two products of d numbers for each query and each key it sees, two FLOPs each."""
        n, heads, d = self.q.shape
        return 4 * heads * d * n * (n + 1) // 2

    def call(self, name: str) -> Call:
        """Causal attention by the candidate `name`."""
        scale = self.q.shape[2] ** -0.5
        if name == "tiled":
            return lambda: tiled_attention(self.q, self.k, self.v, scale=scale)[0]
        if name == "naive":
            return partial(naive_attention, self.q, self.k, self.v, scale=scale)
        if name == "triton":
            n, device = len(self.q), self.q.device
            pools = [x.unflatten(1, (-1, BLOCK_SIZE)) for x in (self.k, self.v)]
            table = range(n // BLOCK_SIZE)
            metadata = AttentionMetadata.build([table], [n], [n], block_size=BLOCK_SIZE, device=device)
            backend = paged_backend(name, device)
            metadata = backend.prepare(metadata, pools[0], self.q.shape[1] // len(self.k))
            return partial(backend.attend, self.q, *pools, metadata, scale=scale)
        return partial(self._sdpa, {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}.get(name))

    def _sdpa(self, backend: SDPBackend | None) -> Tensor:
        batch = (self.q.transpose(0, 1)[None], self.k[None], self.v[None])
        with sdpa_kernel(backend) if backend else nullcontext():
            return scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    def error(self, out: Tensor) -> float:
        """Largest difference from float32, over the last queries."""
        q = self.q[-CHECKED:].float()
        exact = naive_attention(q, self.k.float(), self.v.float(), scale=q.shape[2] ** -0.5)
        return (out[-CHECKED:].float() - exact).abs().max().item()


@dataclass(frozen=True)
class Decodes:
    """One new token for each of `batch` sequences, in several layers: keys and values contiguous, and in blocks.

    Blocks are neighbours, as when sequences arrive one by one, or scattered, as after much coming and going.
    Contiguous k and v are `[batch, kv_heads, context, d]`, pools `[kv_heads, num_blocks, BLOCK_SIZE, d]`.
    """

    q: Tensor  # [batch, heads, d]
    layers: list[tuple[Tensor, Tensor, Tensor, Tensor]]  # k, v, k_pool, v_pool
    metadata: AttentionMetadata

    @classmethod
    def random(
        cls,
        shape: str,
        batch: int,
        context: int,
        blocks: str,
        dtype: torch.dtype,
        device: torch.device,
        cold_bytes: int = COLD_BYTES,
    ) -> Decodes:
        heads, kv_heads, d = SHAPES[shape]
        count = context // BLOCK_SIZE
        order = (torch.randperm if blocks == "scattered" else torch.arange)(batch * count, device=device)
        num_layers = max(1, cold_bytes // (2 * batch * context * kv_heads * d * dtype.itemsize))
        layers = []
        for _ in range(num_layers):
            pools = torch.randn(2, kv_heads, batch * count, BLOCK_SIZE, d, dtype=dtype, device=device)
            rows = pools.index_select(2, order).view(2, kv_heads, batch, context, d).transpose(1, 2).contiguous()
            layers.append((*rows, *pools))
        tables = order.view(batch, count).tolist()
        lengths = [1] * batch, [context] * batch
        metadata = AttentionMetadata.build(tables, *lengths, block_size=BLOCK_SIZE, device=device)
        return cls(torch.randn(batch, heads, d, dtype=dtype, device=device), layers, metadata)

    @property
    def bytes(self) -> int:
        """Keys and values of one layer."""
        return 2 * self.layers[0][0].nbytes

    def call(self, name: str) -> Call:
        """All layers by the candidate `name`; returns the output of the last."""
        attend = self._contiguous if name == "contiguous" else self._paged(paged_backend(name, self.q.device))

        def run() -> Tensor:
            for layer in self.layers:
                out = attend(*layer)
            return out

        return run

    def _contiguous(self, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        """The group's query heads as rows of one key/value head, which reads each key once."""
        rows = self.q.view(len(k), k.shape[1], -1, k.shape[3])
        return scaled_dot_product_attention(rows, k, v).view_as(self.q)

    def _paged(self, backend: Backend) -> Callable[..., Tensor]:
        """One layer through the block tables; what all layers share is prepared before the clock runs, as in a step."""
        k_pool, scale = self.layers[0][2], self.q.shape[2] ** -0.5
        metadata = backend.prepare(self.metadata, k_pool, self.q.shape[1] // len(k_pool))

        def attend(_k: Tensor, _v: Tensor, k_pool: Tensor, v_pool: Tensor) -> Tensor:
            return backend.attend(self.q, k_pool, v_pool, metadata, scale=scale)

        return attend

    def error(self, out: Tensor) -> float:
        """Largest difference from float32, over all sequences of the last layer."""
        k, v, *_ = self.layers[-1]
        scale = self.q.shape[2] ** -0.5
        sequences = zip(self.q[:, None], k, v, out[:, None], strict=True)
        return max(
            (one.float() - naive_attention(q.float(), k.float(), v.float(), scale=scale)).abs().max().item()
            for q, k, v, one in sequences
        )
