"""Any step, run by the real model on the engine's paged cache, to be counted or timed.

run = StepRunner(model, decode_step(context=1000, batch=16))
with Counter(model, kv=run.cache) as counted:
    run()
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from minillm.attention.metadata import AttentionMetadata
from minillm.attention.paged import Backend, paged_attention, write_kv
from minillm.config import EngineConfig, ModelConfig
from minillm.costs.steps import Step, num_tokens
from minillm.engine.runner import open_cache
from minillm.kernels import sdpa
from minillm.model.decoder import Decoder, RMSNorm

FUSED = Backend(partial(paged_attention, kernel=sdpa.attention), write_kv)  # one operator, however long the context


class StepRunner:
    """One step of random tokens over a cache that is as full as the step wants; calling it again repeats it.

    The cache holds zeros where earlier steps would have written: right for FLOPs, bytes and time, not for text.
    Requests share nothing. `backend` is how attention reads and writes the blocks, by default the engine's choice, and
    PyTorch's fused attention for a model without memory; `kv_format` is how keys and values are stored.
    """

    def __init__(
        self,
        model: Decoder,
        step: Step,
        *,
        backend: Backend | None = None,
        kv_format: str = "auto",
        seed: int = 0,
    ) -> None:
        self.model, self.step = model, step
        ends = torch.tensor([q_len for q_len, _ in step]).cumsum(0)
        config = EngineConfig(kv_format=kv_format, max_num_seqs=len(step), max_num_batched_tokens=num_tokens(step))
        widths = [-(-kv_len // config.block_size) for _, kv_len in step]
        starts = [1 + sum(widths[:i]) for i in range(len(step))]  # block 0 is the dummy block
        self.cache = open_cache(model, replace(config, num_blocks=1 + sum(widths)))
        if backend is None and model.device.type == "meta" and kv_format == "auto":
            backend = FUSED
        if backend is not None:
            setattr(self.cache, "backend", backend)  # noqa: B010 (quantised caches have one of their own)
        self.metadata = AttentionMetadata.build(
            [list(range(start, start + width)) for start, width in zip(starts, widths, strict=True)],
            [q_len for q_len, _ in step],
            [kv_len for _, kv_len in step],
            block_size=config.block_size,
            device=model.device,
        )
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(model.config.vocab_size, (num_tokens(step),), generator=generator)
        positions = torch.cat([torch.arange(kv_len - q_len, kv_len) for q_len, kv_len in step])
        self.tokens, self.positions = tokens.to(model.device), positions.to(model.device)
        self.last_rows = (ends - 1).to(model.device)

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """Run the step: float32 logits [num_reqs, vocab_size] after the last token of each request."""
        hidden = self.model(self.tokens, self.positions, self.cache.attend(self.metadata))
        return self.model.logits(hidden[self.last_rows])


def weightless(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    """A model of any size that takes no memory, on the meta device: its operators can be counted, not computed."""
    with torch.device("meta"):
        model = Decoder(config)
    for module in model.modules():
        if not isinstance(module, RMSNorm) and not any(module.children()):
            module.to(dtype)
    return model.eval().requires_grad_(False)
