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
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer
from torch import Tensor

from minillm.config import ModelConfig
from minillm.errors import ConfigError
from minillm.model.bpe import END_OF_TEXT_ID, VOCAB_SIZE, save_tokenizer, train_tokenizer
from minillm.model.corpus import held_out_texts, training_documents
from minillm.model.decoder import Decoder
from minillm.model.loader import save_checkpoint
from minillm.model.optimizer import make_optimizers, tie_head_norms

log = logging.getLogger(__name__)

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(hidden_size=256, intermediate_size=768, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=64),
    "tiny-draft": dict(hidden_size=128, intermediate_size=384, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=64),
}
HELD_OUT_BYTES = 200_000

LossFunction = Callable[[Decoder, Tensor], Tensor]


@dataclass(frozen=True)
class TrainConfig:
    """One training run: what is trained, where it is kept, how long, and how fast it learns."""

    shape: str  # a key of SHAPES
    out: Path  # the Hugging Face folder to write
    work: Path  # tokenizer, tokens and the resumable checkpoint; runs that share it share the tokenizer
    minutes: float = 60.0
    seed: int = 0
    batch_tokens: int = 8192
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
        return ModelConfig(
            architecture="Qwen3ForCausalLM",
            vocab_size=vocab_size,
            max_position_embeddings=self.long_length,
            rope_theta=10000.0,
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


def train(config: TrainConfig, *, progress: bool = True) -> History:
    """Train to the end of the budget, or go on where an earlier run with the same `work` stopped; write `out`."""
    tokenizer = load_or_make_tokenizer(config.work)
    tokens = load_or_make_tokens(config.work, tokenizer)
    held_out = held_out_rows(tokenizer, config.length)
    run = Run(config, tokenizer.get_vocab_size())
    run.resume()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task(config.shape, total=1.0)
        while run.progress() < 1:
            run.train_step(tokens)
            if run.history.step % config.report_every == 0:
                run.evaluate(held_out)
            bar.update(task, completed=run.progress(), description=run.describe())
    run.evaluate(held_out)
    run.save()
    export(run, tokenizer)
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
        return min(1.0, self._seconds() / (60 * self.config.minutes))

    def train_step(self, tokens: np.ndarray) -> None:
        """One batch forward and backward, one update; a checkpoint if the last one is old."""
        config, progress = self.config, self.progress()
        length = config.length if progress < 1 - config.long_share else config.long_length
        rows = batch(tokens, self.history.step, length, config.batch_tokens // length, config.seed).to(config.device)
        loss = self.loss_function(self.model, rows)
        loss.backward()
        tie_head_norms(self.model)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        factor = rate_factor(progress, self.history.step, config)
        for optimizer, rate in zip(self.optimizers, (config.matrix_rate, config.vector_rate), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        self.history.step += 1
        self.history.tokens += config.batch_tokens
        self.history.train_losses.append((self.history.step, loss.item()))
        if time.monotonic() - self._saved > config.checkpoint_seconds:
            self.save()

    def evaluate(self, held_out: Tensor) -> float:
        """Held-out loss in nats per token; kept in the history."""
        loss = mean_loss(self.model, held_out, self.config.device)
        self.history.held_out_losses.append((self.history.step, loss))
        log.info("%s", self.describe())
        return loss

    def describe(self) -> str:
        history = self.history
        recent = [loss for _, loss in history.train_losses[-50:]]
        train_loss = sum(recent) / max(1, len(recent))
        held_out = f"{history.held_out_losses[-1][1]:.3f}" if history.held_out_losses else "-"
        speed = history.tokens / max(1e-9, self._seconds())
        return f"step {history.step}  loss {train_loss:.3f}  held out {held_out}  {speed / 1000:.1f}k tokens/s"

    def save(self) -> None:
        """Write the resumable checkpoint. It replaces the last one in one move, so a kill never leaves half a file."""
        self.history.seconds, self._started = self._seconds(), time.monotonic()
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "history": vars(self.history),
        }
        self._path().parent.mkdir(parents=True, exist_ok=True)
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

    def _seconds(self) -> float:
        return self.history.seconds + time.monotonic() - self._started


def row_loss(model: Decoder, rows: Tensor) -> Tensor:
    """Mean cross entropy, in nats, of predicting rows[:, 1:] from rows[:, :-1]; rows [batch, length + 1] int64."""
    inputs, targets = rows[:, :-1], rows[:, 1:]
    count, length = inputs.shape
    positions = torch.arange(length, device=rows.device).repeat(count)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        heads = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        q, k, v = heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).flatten(0, 1)

    with torch.autocast(rows.device.type, torch.bfloat16):
        logits = model.logits(model(inputs.reshape(-1), positions, attend))
    return F.cross_entropy(logits, targets.reshape(-1))


def compiled(function: LossFunction) -> LossFunction:
    """`function` through torch.compile, or as it is from the moment that this machine turns out unable to compile."""
    fast: LossFunction | None = torch.compile(function, dynamic=False)

    def call(model: Decoder, rows: Tensor) -> Tensor:
        nonlocal fast
        if fast is not None:
            try:
                return fast(model, rows)
            except Exception as error:  # no C++ compiler, an unsupported Python …: many types, one remedy
                log.warning("torch.compile does not work here (%s); training goes on without it.", type(error).__name__)
                fast = None
        return function(model, rows)

    return call


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


def batch(tokens: np.ndarray, step: int, length: int, count: int, seed: int) -> Tensor:
    """Rows [count, length + 1] of the packed tokens for one step; a pure function, so a resumed run needs no state.

    Each pass cuts the text into windows and visits all of them once, in an order drawn from (seed, pass).
    """
    windows = (len(tokens) - 1) // length
    steps_per_pass = max(1, windows // count)
    order = np.random.default_rng((seed, step // steps_per_pass)).permutation(windows)
    start = step % steps_per_pass * count
    rows = [tokens[w * length : w * length + length + 1] for w in order[start : start + count]]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


@torch.no_grad()
def mean_loss(model: Decoder, rows: Tensor, device: str, count: int = 8) -> float:
    """Mean loss over rows [n, length + 1], in nats per token."""
    losses = [row_loss(model, part.to(device)) * len(part) for part in rows.split(count)]
    return float(torch.stack(losses).sum() / len(rows))


def held_out_rows(tokenizer: Tokenizer, length: int) -> Tensor:
    """The held-out texts, packed and cut to rows [n, length + 1]."""
    packed = pack(tokenizer, held_out_texts(HELD_OUT_BYTES)).astype(np.int64)
    count = (len(packed) - 1) // length
    return torch.from_numpy(np.stack([packed[i * length : i * length + length + 1] for i in range(count)]))


def pack(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """All texts as one row of token ids (uint16), <|endoftext|> after each."""
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return np.concatenate([np.array([*encoding.ids, END_OF_TEXT_ID], dtype=np.uint16) for encoding in encodings])


def load_or_make_tokenizer(work: Path) -> Tokenizer:
    """The tokenizer in `work`, trained on the corpus if it is not there yet."""
    path = work / "tokenizer.json"
    if not path.exists():
        log.info("training the tokenizer")
        save_tokenizer(train_tokenizer((d.text for d in training_documents()), VOCAB_SIZE), work, 2048)
    return Tokenizer.from_file(str(path))


def load_or_make_tokens(work: Path, tokenizer: Tokenizer, seed: int = 0) -> np.ndarray:
    """The corpus as tokens, documents in an order drawn from `seed`; made once, then read from `work`."""
    path = work / "tokens.npy"
    if not path.exists():
        log.info("encoding the corpus")
        documents = training_documents()
        order = np.random.default_rng(seed).permutation(len(documents))
        np.save(path, pack(tokenizer, (documents[i].text for i in order)))
    return np.load(path, mmap_mode="r")


def export(run: Run, tokenizer: Tokenizer) -> None:
    """Write the Hugging Face folder: weights in bfloat16, config, tokenizer."""
    save_checkpoint(run.model, run.config.out)
    save_tokenizer(tokenizer, run.config.out, run.config.long_length)
