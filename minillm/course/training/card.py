"""What a training run leaves for its readers: a model card and a picture of its losses."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minillm.config import ModelConfig

Losses = Sequence[tuple[int, float]]  # (step, nats per token)


@dataclass(frozen=True)
class Facts:
    """Everything that the card states, as measured."""

    name: str
    config: ModelConfig
    parameters: int
    command: str
    documents: int
    corpus_bytes: int
    corpus_tokens: int
    steps: int
    tokens: int
    minutes: float
    held_out_loss: float  # nats per token
    held_out_bytes_per_token: float
    python: str
    machine: str

    @property
    def bits_per_byte(self) -> float:
        """Held-out loss, comparable between tokenizers."""
        return self.held_out_loss / math.log(2) / self.held_out_bytes_per_token


def write_card(facts: Facts, folder: Path) -> None:
    """Write README.md, the model card of a Hugging Face folder."""
    (folder / "README.md").write_text(CARD.format(f=facts, c=facts.config), encoding="utf8")


def plot_losses(train: Losses, held_out: Losses, path: Path) -> None:
    """Draw both losses over steps to a picture file; the training loss as a running mean of 50 steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    steps, losses = zip(*train, strict=True)
    smooth = [sum(losses[max(0, i - 49) : i + 1]) / min(50, i + 1) for i in range(len(losses))]
    axes.plot(steps, smooth, label="training, mean of 50 steps")
    axes.plot(*zip(*held_out, strict=True), marker="o", markersize=3, label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(min(smooth) - 0.2, 6))
    axes.legend()
    figure.savefig(path, dpi=150)


def machine_name() -> str:
    """The processor's name and the cores of this machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


CARD = """---
license: apache-2.0
library_name: transformers
tags: [python, course, minillm]
---

# minillm {f.name}

A decoder of {f.parameters:,} parameters that continues Python source. It was trained from nothing, on a CPU, for a
course that takes an inference engine apart: small enough to ship, trained enough to have something to measure.

| | |
|---|---|
| architecture | {c.architecture}: {c.num_layers} layers, hidden {c.hidden_size}, {c.num_heads} query heads over \
{c.num_kv_heads} key/value heads of {c.head_dim}, MLP {c.intermediate_size}, tied embeddings, \
{c.max_position_embeddings} positions |
| tokenizer | byte-level BPE, {c.vocab_size} tokens, trained on the same corpus; `<|endoftext|>` between files, no BOS |
| corpus | {f.documents:,} Python files, {f.corpus_bytes:,} bytes, {f.corpus_tokens:,} tokens: the standard library \
({f.python}, twice) and this project's installed dependencies; no tests, no generated files, no tables |
| training | {f.steps:,} steps, {f.tokens:,} tokens, {f.minutes:.0f} minutes; Muon and AdamW, bfloat16 products, \
float32 weights |
| held-out loss | {f.held_out_loss:.3f} nats per token = {f.bits_per_byte:.3f} bits per byte |
| machine | {f.machine} |
| command | `{f.command}` |

The held-out texts are files of the standard library chosen by a hash of their name; no training run reads them
(`minillm.measure.corpus.held_out_texts`). {f.held_out_bytes_per_token:.2f} bytes make one token there.

## What it is

A model whose distribution is real: sharp where code is predictable (indentation, brackets, repeated names) and flat
where it is not. So acceptance rates, perplexity under quantisation and attention patterns mean something on it.

## What it is not

It does not know how to program. Its completions look like Python and rarely compute what their names promise. It was
never taught to answer, it has no chat template, and it knows English only from comments and docstrings. It has seen
public source code, and can repeat lines of it. Do not use it for anything but learning how inference works.
"""
