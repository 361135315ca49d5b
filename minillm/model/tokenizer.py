"""Text to token ids and back: any tokenizer of the family's models, and text that arrives token by token.

Every tokenizer of the family is a map from tokens to *bytes*; only its spelling of bytes differs. Byte-level
vocabularies (Llama 3, Qwen, SmolLM2, ours) write each byte as one printable letter, SentencePiece ones (Llama 2,
TinyLlama, Mistral) write a space as "▁" and rare bytes as "<0x0A>". Once a token is bytes, decoding is UTF-8: a
character that needs two tokens is held back until the second one comes, and nothing that was shown changes later.

Text is decoded as a continuation: the leading space of a first SentencePiece token stays, which that library would
strip as if a new text began. Special tokens (<|endoftext|>, <s>) have no text, unless one asks for it.
"""

from __future__ import annotations

import codecs
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from minillm import seams
from minillm.errors import CheckpointError, RequestError, shown
from minillm.model.hf import MAX_JSON, check_file, read_config, read_json
from minillm.model.loader import EMBEDDED, checkpoint_folder
from minillm.sampling import is_text

Message = Mapping[str, Any]
RenderChat = Callable[[Sequence[Message]], str]

# GPT-2's alphabet: a byte that Latin-1 prints stands for itself, the others for the letters from U+0100 on.
PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
OTHERS = [byte for byte in range(256) if byte not in PRINTED]
LETTERS = {chr(byte): byte for byte in PRINTED} | {chr(0x100 + i): byte for i, byte in enumerate(OTHERS)}
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
MAX_TOKENIZER, MAX_TOKENS, MAX_GROWTH = 32 << 20, 1 << 19, 64  # bytes of tokenizer.json, entries, letters for a letter
FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt") + (
    ("tokenizer.model", "chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja")
)


class Tokenizer:
    """A tokenizer's vocabulary and, where its files have them, its own end of text and its chat template.

    Where a model ends is in its config; a tokenizer may have a further end, such as that of a turn.
    """

    def __init__(self, backend: Backend, *, eos_token_id: int | None = None, chat: RenderChat | None = None) -> None:
        self._backend = backend
        self._chat = chat
        self._added = backend.get_added_tokens_decoder()
        self._spell = _spelling(backend)
        self.eos_token_id = eos_token_id

    @property
    def vocabulary(self) -> dict[int, str]:
        """Every token as the vocabulary itself spells it, special ones included."""
        return {index: token for token, index in self._backend.get_vocab(with_added_tokens=True).items()}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; begins with BOS exactly where the model's own tokenizer does it.

        Raises RequestError for what is no text: another type, or half of a surrogate pair, which UTF-8 cannot write.
        """
        self._backend.no_truncation()  # a file may bring either, and whoever shares the object may switch it on
        self._backend.no_padding()
        if not is_text(text):
            raise RequestError(f"A prompt must be a string without half characters, not {shown(text)}. Give text.")
        with _named_errors("This model's tokenizer cannot encode the text"):
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids as the continuation of a text. Bytes that are no UTF-8 become U+FFFD."""
        parts = (self.token_bytes(token_id, skip_special_tokens) for token_id in token_ids)
        return b"".join(parts).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        """What one token contributes to the text; nothing for ids beyond the vocabulary.

        Special tokens contribute nothing, or their names with skip_special_tokens=False.
        """
        if token_id in self._added:
            added = self._added[token_id]
            return b"" if added.special and skip_special_tokens else str(added.content).encode()
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._spell(token)

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer.

        messages: {"role": "system" | "user" | "assistant", "content": text or [{"type": "text", "text": text}, …]}.
        Raises RequestError for messages that are none or that the template refuses, and for a model without a chat
        template, such as the embedded ones.
        """
        if self._chat is None:
            raise RequestError("This model has no chat template. Use generate, or a model such as Qwen/Qwen3-0.6B.")
        return self.encode(self._chat(messages), add_special_tokens=False)


class Detokenizer:
    """Text of one request, token by token, never half a character.

    The deltas and the flush, joined, are `tokenizer.decode` of all ids. It knows the request's own tokens only: where
    a prompt ends inside a character, the rest of that character is U+FFFD, and nothing of the prompt leaks out.
    Each token costs the same, however long the text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._token_bytes = partial(tokenizer.token_bytes, skip_special_tokens=skip_special_tokens)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The characters that these tokens complete; empty while a character is in the making."""
        return self._utf8.decode(b"".join(map(self._token_bytes, token_ids)))

    def flush(self) -> str:
        """What is left when the request ends: U+FFFD for an unfinished character. Ready for the next text."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(name: str | Path = "tiny") -> Tokenizer | None:
    """The tokenizer of a model, by the names of `load_model`; None for "random:<shape>", which has no vocabulary.

    config.json is checked first: it says whether this is a model of ours, before anything else of the folder is read.
    Raises CheckpointError for a folder without a tokenizer, with one of another kind, or with damaged files.
    """
    if isinstance(name, str) and name.startswith("random:"):
        return None
    folder = checkpoint_folder(name)
    if os.path.lexists(folder / "config.json"):
        read_config(folder)
    if folder.parent == EMBEDDED:  # no chat template and no options, so no `transformers`, whose import takes seconds
        return Tokenizer(Backend.from_file(str(folder / "tokenizer.json")))
    from transformers import AutoTokenizer

    with _named_errors(f"{folder} has no tokenizer that transformers can load, such as tokenizer.json"):
        _check_files(folder)
        loaded: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        extra = seams.offer("chat_template")
        chat = extra.ChatTemplate.of(loaded) if extra else None
        return Tokenizer(loaded.backend_tokenizer, eos_token_id=loaded.eos_token_id, chat=chat and chat.render)


@contextmanager
def _named_errors(what: str) -> Iterator[None]:
    """Turn whatever tokenizers raise into CheckpointError. Their library panics with a BaseException of its own, so all
    is caught but what ends a program."""
    try:
        yield
    except (CheckpointError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise CheckpointError(f"{what} ({type(error).__name__}: {' '.join(str(error).split())[:200]}).") from error


def _check_files(folder: Path) -> None:
    """Refuse what the tokenizers library would answer by taking all memory or by ending Python.

    Called within `_named_errors`: a value of another type than a tokenizer has there may raise anything.
    """
    for path in (path for name in FILES for path in folder.glob(name)):
        read_json(path) if path.suffix == ".json" else check_file(path, MAX_JSON)
    path = folder / "tokenizer.json"
    if not os.path.lexists(path):
        return
    content = read_json(path, MAX_TOKENIZER)
    entries = len((content.get("model") or {}).get("vocab") or ())
    if not 1 <= entries <= MAX_TOKENS:
        raise CheckpointError(f"{path} has a vocabulary of {entries} entries; 1 to {MAX_TOKENS} are needed. Check it.")
    if (growth := _growth(content.get("normalizer"), path)) > MAX_GROWTH:
        raise CheckpointError(f"{path} has a normalizer that makes a text {growth:.0g} times as long. Check it.")


def _growth(normalizer: Any, path: Path) -> float:
    """How many times as long a normalizer may make a text, by its replacements."""
    kind = normalizer["type"] if normalizer else None
    if kind == "Precompiled":
        raise CheckpointError(f"{path} has a Precompiled normalizer, which no model of the Llama family has. Check it.")
    if kind == "Sequence":
        return math.prod(_growth(one, path) for one in normalizer["normalizers"])
    if kind != "Replace":
        return 1
    old = normalizer["pattern"].get("String", "")
    return max(1, len(normalizer["content"]) / max(1, len(old)))


def _spelling(backend: Backend) -> Callable[[str], bytes]:
    """How this vocabulary writes bytes, told by how it writes the line break."""
    if backend.token_to_id("<0x0A>") is not None:
        return _sentencepiece_bytes
    if backend.token_to_id("Ċ") is not None:
        return _byte_level_bytes
    raise CheckpointError("This tokenizer can spell neither bytes as letters nor as <0x0A>. Check tokenizer.json.")


def _sentencepiece_bytes(token: str) -> bytes:
    byte = BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()


def _byte_level_bytes(token: str) -> bytes:
    """Letters of GPT-2's alphabet are bytes; a token with any other letter is text, as the library reads it."""
    return bytes(LETTERS[letter] for letter in token) if LETTERS.keys() >= set(token) else token.encode()
