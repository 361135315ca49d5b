"""Conversations: checked, then written out by a model's chat template in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm.errors import CheckpointError, RequestError

Message = Mapping[str, Any]  # {"role": "user", "content": text or [{"type": "text", "text": text}, ...]}
SECONDS = 1.0  # a template takes about a millisecond


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages with their contents as text. Raises RequestError for one that is no message."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(f'A conversation is a list of {{"role": …, "content": …}}, not {messages!r:.80}.')
    return [_plain(index, message) for index, message in enumerate(messages)]


def _plain(index: int, message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"messages[{index}] is {message!r:.80}; a mapping with a role and a content is needed.")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    good = isinstance(parts, list | tuple) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    )
    if not good:
        raise RequestError(
            f"messages[{index}] has content={content!r:.120}; a string is needed, or a list of parts such as "
            '{"type": "text", "text": "…"}. Parts of other types (images, audio) are not supported.'
        )
    said = {key: value for key, value in message.items() if value is not None}  # as the APIs of others write "nothing"
    return said | {"content": "".join(part["text"] for part in parts or ())}


class ChatTemplate:
    """A model's chat template. `render` is called from any thread, one conversation at a time.

    The process that renders (`minillm.chat.render`) starts at the first conversation and lives as long as this object,
    unless a conversation makes it too slow or too large: then it is ended, and the next one gets a fresh process.
    """

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate | None:
        """The default template of a tokenizer of transformers, which may call its special tokens by name; or None."""
        template = tokenizer.chat_template
        template = template.get("default") if isinstance(template, dict) else template
        if not isinstance(template, str | None):
            folder = tokenizer.name_or_path
            raise CheckpointError(f"{folder} has chat_template={template!r:.80} in its files; a text is needed.")
        names = {name: text for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
        return cls(template, names) if template else None

    def __init__(self, template: str, variables: Mapping[str, Any]) -> None:
        self._template, self._variables = template, dict(variables)
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as one text that ends where the assistant's answer begins. Raises RequestError."""
        given = {"messages": plain_messages(messages), "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            line = json.dumps({"template": self._template, "variables": self._variables | given})
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"The messages hold what no chat template can take ({error}). Give texts.") from None
        answer = json.loads(self._ask(line) or '{"error": "it took too long, or too much memory, and was ended"}')
        if "text" not in answer:
            raise RequestError(f"The model's chat template refuses this conversation, or is damaged: {answer['error']}")
        return str(answer["text"])

    def _ask(self, line: str) -> str:
        """The child's answer to a line, empty if it was ended. A child that was left in the middle is never reused."""
        with self._lock:
            child, self._child = self._child or _start(), None
            assert child.stdin and child.stdout
            timer = threading.Timer(SECONDS, child.kill)
            timer.start()
            try:
                child.stdin.write(line + "\n")
                child.stdin.flush()
                answer = child.stdout.readline()
                self._child = child if answer else None
            except OSError:
                answer = ""
            finally:
                timer.cancel()
                if self._child is None:
                    child.kill()
            return answer


def _start() -> subprocess.Popen[str]:
    pipe, program = subprocess.PIPE, str(Path(__file__).with_name("render.py"))
    child = subprocess.Popen([sys.executable, program], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout
    if not child.stdout.readline():
        raise RequestError("Chat templates need the package jinja2 (pip install jinja2).")
    return child
