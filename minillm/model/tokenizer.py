"""Text to token ids and back: any tokenizer of the family's models, and text that arrives token by token.

Every tokenizer of the family is a map from tokens to *bytes*; only its spelling of bytes differs. Byte-level
vocabularies (Llama 3, Qwen, SmolLM2, ours) write each byte as one printable letter, SentencePiece ones (Llama 2,
TinyLlama, Mistral) write a space as "▁" and rare bytes as "<0x0A>". Once a token is bytes, decoding is UTF-8: a
character that needs two tokens is held back until the second one comes, and nothing that was shown changes later.

Text is decoded as a continuation: the leading space of a first SentencePiece token stays, which that library would
strip as if a new text began. Special tokens (<|endoftext|>, <s>) have no text.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from minillm.errors import CheckpointError, RequestError
from minillm.model.loader import EMBEDDED, checkpoint_folder

Message = Mapping[str, str]
RenderChat = Callable[[Sequence[Message]], str]

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """A tokenizer's vocabulary, its end-of-text ids and, where the model has one, its chat template."""

    def __init__(self, backend: Backend, *, eos_token_ids: Iterable[int] = (), chat: RenderChat | None = None) -> None:
        self._backend = backend
        self._chat = chat
        self._added = backend.get_added_tokens_decoder()
        self._spell = _spelling(backend)
        self.eos_token_ids = tuple(sorted(set(eos_token_ids)))

    @property
    def vocab_size(self) -> int:
        """Tokens that exist; a model's own vocab_size may be padded beyond it."""
        return int(self._backend.get_vocab_size())

    @property
    def vocabulary(self) -> dict[int, str]:
        """Every token as the vocabulary itself spells it, special ones included."""
        return {index: token for token, index in self._backend.get_vocab(with_added_tokens=True).items()}

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; begins with BOS exactly where the model's own tokenizer does it.

        Raises RequestError for what is no text: another type, or half of a surrogate pair, which UTF-8 cannot write.
        """
        return self._encode(text, add_special_tokens=add_special_tokens)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError:
            raise RequestError(
                f"A prompt must be a string of Unicode characters, not {text!r:.80}. Give text, or token ids where "
                "the caller takes them."
            ) from None

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of token ids as the continuation of a text. Bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What one token contributes to the text; nothing for special tokens and for ids beyond the vocabulary."""
        if token_id in self._added:
            added = self._added[token_id]
            return b"" if added.special else str(added.content).encode()
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._spell(token)

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer.

        messages: {"role": "system" | "user" | "assistant", "content": text}. Raises RequestError for a model
        without a chat template, such as the embedded ones.
        """
        if self._chat is None:
            raise RequestError(
                "This model has no chat template: it continues text and was never taught to answer. "
                "Use generate, or choose an instruction-tuned model such as Qwen/Qwen3-0.6B."
            )
        return self._encode(self._chat(messages), add_special_tokens=False)


class Detokenizer:
    """Text of one request, token by token, never half a character.

    The deltas and the flush, joined, are `tokenizer.decode` of all ids. It knows the request's own tokens only: where
    a prompt ends inside a character, the rest of that character is U+FFFD, and nothing of the prompt leaks out.
    Each token costs the same, however long the text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The characters that these tokens complete; empty while a character is in the making."""
        return self._utf8.decode(b"".join(map(self._token_bytes, token_ids)))

    def flush(self) -> str:
        """What is left when the request ends: U+FFFD for an unfinished character. Ready for the next text."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def load_tokenizer(name: str | Path = "tiny") -> Tokenizer | None:
    """The tokenizer of a model, by the names of `load_model`; None for "random:<shape>", which has no vocabulary.

    Raises CheckpointError for a folder without a tokenizer or with one of another kind.
    """
    if str(name).startswith("random:"):
        return None
    folder = checkpoint_folder(name)
    return _load_embedded(folder) if folder.parent == EMBEDDED else _load_with_transformers(folder)


def _load_embedded(folder: Path) -> Tokenizer:
    """Ours has no chat template and no options, so it needs no `transformers`, whose import takes seconds."""
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    return Tokenizer(backend, eos_token_ids=_end_ids(folder, "config.json"))


def _load_with_transformers(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(str(folder))
        backend = loaded.backend_tokenizer
    except Exception as error:  # transformers raises whatever its many tokenizers raise
        raise CheckpointError(
            f"{folder} has no tokenizer that transformers can load ({str(error).splitlines()[0]}). "
            "A model folder needs tokenizer.json and tokenizer_config.json beside its weights."
        ) from error
    own = [] if loaded.eos_token_id is None else [loaded.eos_token_id]
    ends = own + _end_ids(folder, "generation_config.json")

    def render(messages: Sequence[Message]) -> str:
        return str(loaded.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))

    return Tokenizer(backend, eos_token_ids=ends, chat=render if loaded.chat_template else None)


def _end_ids(folder: Path, file: str) -> list[int]:
    """The ids that end a text by one of the folder's config files; chat models have several."""
    path = folder / file
    ends = json.loads(path.read_text(encoding="utf8")).get("eos_token_id") if path.exists() else None
    if ends is None:
        return []
    return list(ends) if isinstance(ends, list) else [ends]


def _spelling(backend: Backend) -> Callable[[str], bytes]:
    """How this vocabulary writes bytes, told by how it writes the line break."""
    if backend.token_to_id("<0x0A>") is not None:
        return _sentencepiece_bytes
    if backend.token_to_id("Ċ") is not None:
        return _byte_level_bytes
    raise CheckpointError(
        "This tokenizer can spell neither bytes as letters (byte-level BPE) nor as <0x0A> (SentencePiece with byte "
        "fallback). The models of the Llama family have one of the two; check tokenizer.json."
    )


def _sentencepiece_bytes(token: str) -> bytes:
    byte = BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()


def _byte_level_bytes(token: str) -> bytes:
    letters = _byte_letters()
    return bytes(letters[letter] for letter in token)


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """GPT-2's alphabet: a byte that Latin-1 prints stands for itself, the others for the letters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
