"""Training the embedded models: a small Qwen3 on Python source, on a CPU, in about an hour.

The decoder trained is the decoder that serves. It knows no cache, so training is one more `attend`: causal attention
within each row of the batch. Weights are float32, products bfloat16 (autocast); the saved checkpoint is bfloat16.

The budget is a clock: progress is the share of `minutes` that has passed. The learning rate is constant first and
falls to zero over the last `decay_share`; the last `long_share` trains on long rows, so that long contexts work.
A run may be stopped at any moment: the same command picks it up at its last checkpoint, minutes behind at most.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from minillm.config import ModelConfig
from minillm.course.training.batches import TrainingData, batch, count_windows, prepare, windows
from minillm.course.training.bpe import END_OF_TEXT_ID, save_tokenizer
from minillm.course.training.card import Facts, machine_name, plot_losses, write_card
from minillm.course.training.checkpoint import save_checkpoint
from minillm.course.training.loss import compiled, mean_loss, row_loss
from minillm.course.training.optimizer import make_optimizers, tie_head_norms
from minillm.errors import ConfigError
from minillm.model.decoder import Decoder

log = logging.getLogger(__name__)

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(hidden_size=256, intermediate_size=768, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=64),
    "tiny-draft": dict(hidden_size=128, intermediate_size=384, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=64),
}


@dataclass(frozen=True)
class TrainConfig:
    """One training run: what is trained, where it is kept, how long, and how fast it learns."""

    shape: str  # a key of SHAPES
    out: Path  # the Hugging Face folder to write
    work: Path  # tokenizer, tokens and the resumable checkpoint; runs that share it share the tokenizer
    tokenizer: Path | None = None  # a tokenizer.json to use, such as that of the model to draft for; None trains one
    minutes: float = 60.0
    seed: int = 0
    batch_tokens: int = 4096
    length: int = 512
    long_length: int = 2048
    long_share: float = 0.12
    warmup_steps: int = 50
    decay_share: float = 0.4
    matrix_rate: float = 0.02
    vector_rate: float = 0.004
    weight_decay: float = 0.01
    clip: float = 1.0
    checkpoint_seconds: float = 180.0
    report_every: int = 200
    compile: bool = True
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ConfigError(f"No embedded model is called {self.shape!r}. Choose one of {', '.join(SHAPES)}.")
        if self.minutes <= 0:
            raise ConfigError(f"minutes={self.minutes}: training needs a positive time.")
        if self.batch_tokens % self.length or self.batch_tokens % self.long_length:
            raise ConfigError(
                f"batch_tokens={self.batch_tokens} must be a multiple of length={self.length} and "
                f"long_length={self.long_length}: a batch is whole rows."
            )

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The Qwen3 config of this shape, for a tokenizer of that size."""
        return ModelConfig(
            architecture="Qwen3ForCausalLM",
            vocab_size=vocab_size,
            max_position_embeddings=self.long_length,
            tie_word_embeddings=True,
            qk_norm=True,
            eos_token_ids=(END_OF_TEXT_ID,),
            **SHAPES[self.shape],
        )


@dataclass
class History:
    """What a run has done so far; saved with each checkpoint. Losses are (step, nats per token)."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    train_losses: list[tuple[int, float]] = field(default_factory=list)
    held_out_losses: list[tuple[int, float]] = field(default_factory=list)


def train(
    config: TrainConfig,
    *,
    command: str,
    plot: Path | None = None,
    progress: bool = True,
    console: Console | None = None,
) -> History:
    """Train to the end of the budget, or go on where an earlier run with the same `work` stopped; write `out`.

    command: what a reader types to repeat this, for the model card. plot: a picture file for the loss curves.
    console: where progress is shown.
    """
    data = prepare(config.work, config.tokenizer)
    held_out = windows(data.held_out, config.length, range(count_windows(data.held_out, config.length)))
    run = Run(config, data.tokenizer.get_vocab_size())
    run.resume()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not progress, console=console) as bar:
        task = bar.add_task(config.shape, total=1.0)
        while run.progress() < 1:
            run.train_step(data.tokens)
            if run.history.step % config.report_every == 0:
                run.evaluate(held_out)
            bar.update(task, completed=run.progress(), description=run.describe())
    run.evaluate(held_out)
    run.save()
    export(run, data, command)
    if plot is not None:
        plot_losses(run.history.train_losses, run.history.held_out_losses, plot)
    return run.history


class Run:
    """A model, its optimizers and its history, at one moment of training."""

    def __init__(self, config: TrainConfig, vocab_size: int) -> None:
        self.config = config
        self.model = initialize(Decoder(config.model_config(vocab_size)), config.seed).to(config.device)
        self.optimizers = make_optimizers(
            self.model,
            matrix_rate=config.matrix_rate,
            vector_rate=config.vector_rate,
            weight_decay=config.weight_decay,
        )
        self.history = History()
        self.loss_function = compiled(row_loss) if config.compile else row_loss
        self._started = self._saved = time.monotonic()

    def progress(self) -> float:
        """The share of the time budget that has passed, in this process and the ones before it."""
        return min(1.0, self.seconds() / (60 * self.config.minutes))

    def seconds(self) -> float:
        """Time spent on this run, in this process and the ones before it."""
        return self.history.seconds + time.monotonic() - self._started

    def train_step(self, tokens: np.ndarray) -> None:
        """One batch forward and backward, one update; a checkpoint if the last one is old."""
        config, progress = self.config, self.progress()
        length = config.length if progress < 1 - config.long_share else config.long_length
        rows = batch(tokens, self.history.step, length, config.batch_tokens // length, config.seed).to(config.device)
        loss = self.loss_function(self.model, rows)
        loss.backward()
        tie_head_norms(self.model)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self._update(rate_factor(progress, self.history.step, config))
        self.history.step += 1
        self.history.tokens += config.batch_tokens
        self.history.train_losses.append((self.history.step, loss.item()))
        if time.monotonic() - self._saved > config.checkpoint_seconds:
            self.save()

    def _update(self, factor: float) -> None:
        peaks = (self.config.matrix_rate, self.config.vector_rate)
        for optimizer, peak in zip(self.optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()

    def evaluate(self, held_out: Tensor) -> None:
        """Add the loss on rows [n, length + 1] to the history."""
        self.history.held_out_losses.append((self.history.step, mean_loss(self.model, held_out.to(self.config.device))))
        log.info("%s", self.describe())

    def describe(self) -> str:
        """One line about where the run is."""
        history = self.history
        recent = [loss for _, loss in history.train_losses[-50:]]
        train_loss = sum(recent) / max(1, len(recent))
        held_out = f"{history.held_out_losses[-1][1]:.3f}" if history.held_out_losses else "-"
        speed = history.tokens / max(1e-9, self.seconds())
        return f"step {history.step}  loss {train_loss:.3f}  held out {held_out}  {speed / 1000:.1f}k tokens/s"

    def save(self) -> None:
        """Write the resumable checkpoint. It replaces the last one in one move, so a kill never leaves half a file."""
        self.history.seconds, self._started = self.seconds(), time.monotonic()
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "history": vars(self.history),
        }
        temporary = self._path().with_suffix(".new")
        torch.save(state, temporary)
        os.replace(temporary, self._path())
        self._saved = time.monotonic()

    def resume(self) -> None:
        """Load the checkpoint of an earlier run, if there is one."""
        if not self._path().exists():
            return
        state = torch.load(self._path(), map_location=self.config.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.history = History(**state["history"])

    def _path(self) -> Path:
        return self.config.work / f"{self.config.shape}.pt"


def initialize(model: Decoder, seed: int) -> Decoder:
    """Normal weights; zeros where a layer writes to the residual stream, so that every layer begins as nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                weight.zero_()
            elif "norm" not in name:
                weight.normal_(0, model.config.initializer_range, generator=generator)
    return model


def rate_factor(progress: float, step: int, config: TrainConfig) -> float:
    """The learning rate's share of its peak: linear warm-up by steps, constant, linear to zero by the clock."""
    return min(1.0, (step + 1) / config.warmup_steps, (1 - progress) / config.decay_share)


def export(run: Run, data: TrainingData, command: str) -> None:
    """Write the Hugging Face folder: weights in bfloat16, config, tokenizer, model card."""
    folder, history = run.config.out, run.history
    save_checkpoint(run.model, folder)
    save_tokenizer(data.tokenizer, folder, run.config.long_length)
    facts = Facts(
        name=run.config.shape,
        config=run.model.config,
        parameters=sum(weight.numel() for weight in run.model.parameters()),
        command=command,
        documents=data.documents,
        corpus_bytes=data.corpus_bytes,
        corpus_tokens=len(data.tokens),
        steps=history.step,
        tokens=history.tokens,
        minutes=run.seconds() / 60,
        held_out_loss=history.held_out_losses[-1][1],
        held_out_bytes_per_token=data.held_out_bytes / len(data.held_out),
        python=f"Python {platform.python_version()}",
        machine=machine_name(),
    )
    write_card(facts, folder)
