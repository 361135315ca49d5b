"""Training the byte-level BPE tokenizer of the embedded models (Sennrich et al. 2016, arXiv:1508.07909).

The pattern that cuts text into words before BPE sees it is made for Python. Every line break is one token and every
indentation can become one, whatever its depth. Both stand alone, so a prompt may end after "):", after the line
break or after the indentation, and is cut exactly as the training text was. A dot, an underscore or a space joins the
word behind it (".append", "_heads", " self"), a name such as __init__ is one word, each digit is a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
VOCAB_SIZE = 4096

WORDS = "|".join(
    (
        r"(?<![^\n])[^\S\n]+",  # indentation: spaces at the start of a line
        r"\n",
        r" ?__\p{L}+__",
        r"[ ._]?\p{L}+",
        r" ?\p{N}",
        r" ?[^\s\p{L}\p{N}]+",  # punctuation
        r"[^\S\n]+(?!\S)",  # other spaces; the last one before a word belongs to the word
        r"[^\S\n]+",
    )
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A tokenizer with `vocab_size` entries: <|endoftext|> (id 0), 256 bytes, merges. Any string round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int = 2048) -> None:
    """Write tokenizer.json and tokenizer_config.json, so that `AutoTokenizer` loads the folder as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf8")
