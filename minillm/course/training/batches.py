"""From source files to batches: the tokenizer and the tokens of a training run, and the rows of each step."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from minillm.course.training.bpe import END_OF_TEXT_ID, VOCAB_SIZE, save_tokenizer, train_tokenizer
from minillm.errors import ConfigError
from minillm.measure.corpus import held_out_texts, training_documents

log = logging.getLogger(__name__)

HELD_OUT_BYTES = 200_000


@dataclass(frozen=True)
class TrainingData:
    """A tokenizer and all that is measured in its tokens."""

    tokenizer: Tokenizer
    tokens: np.ndarray  # [n] uint16: the whole corpus, <|endoftext|> after each file
    documents: int
    corpus_bytes: int
    held_out: np.ndarray  # [n] uint16
    held_out_bytes: int


def prepare(work: Path, tokenizer_file: Path | None = None, seed: int = 0) -> TrainingData:
    """The data in the folder `work`; made from the corpus if it is not there yet, which takes minutes.

    tokenizer_file: the tokenizer.json to encode with; None trains one. Raises ConfigError if there is no such file.
    """
    if not (work / "corpus.json").exists():
        _make(work, tokenizer_file, seed)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    texts = held_out_texts(HELD_OUT_BYTES)
    return TrainingData(
        tokenizer=tokenizer,
        tokens=np.load(work / "tokens.npy", mmap_mode="r"),
        **json.loads((work / "corpus.json").read_text(encoding="utf8")),
        held_out=pack(tokenizer, texts),
        held_out_bytes=sum(len(text.encode()) for text in texts),
    )


def _make(work: Path, tokenizer_file: Path | None, seed: int) -> None:
    """Train or take the tokenizer and encode the corpus, files in an order drawn from `seed`."""
    if tokenizer_file is not None and not tokenizer_file.is_file():
        raise ConfigError(f"There is no tokenizer at {tokenizer_file}. Give a tokenizer.json, or none to train one.")
    work.mkdir(parents=True, exist_ok=True)
    texts = [document.text for document in training_documents()]
    log.info("tokenizing %d files", len(texts))
    tokenizer = Tokenizer.from_file(str(tokenizer_file)) if tokenizer_file else train_tokenizer(texts, VOCAB_SIZE)
    save_tokenizer(tokenizer, work)
    order = np.random.default_rng(seed).permutation(len(texts))
    np.save(work / "tokens.npy", pack(tokenizer, (texts[i] for i in order)))
    counts = {"documents": len(texts), "corpus_bytes": sum(len(text.encode()) for text in texts)}
    (work / "corpus.json").write_text(json.dumps(counts), encoding="utf8")


def pack(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """All texts as one row of token ids (uint16), <|endoftext|> after each."""
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return np.concatenate([np.array([*encoding.ids, END_OF_TEXT_ID], dtype=np.uint16) for encoding in encodings])


def windows(tokens: np.ndarray, length: int, chosen: Iterable[int]) -> Tensor:
    """Rows [n, length + 1] int64: window w begins at w * length, and ends with the first token of the next one."""
    rows = [tokens[w * length : w * length + length + 1] for w in chosen]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def count_windows(tokens: np.ndarray, length: int) -> int:
    """How many whole windows there are."""
    return (len(tokens) - 1) // length


def batch(tokens: np.ndarray, step: int, length: int, count: int, seed: int) -> Tensor:
    """The rows [count, length + 1] of one step; a pure function, so that a resumed run needs no state for it.

    Each pass visits every window once, in an order drawn from (seed, pass).
    """
    available = count_windows(tokens, length)
    steps_per_pass = max(1, available // count)
    order = np.random.default_rng((seed, step // steps_per_pass)).permutation(available)
    start = step % steps_per_pass * count
    return windows(tokens, length, order[start : start + count])
