"""From tokens to text that is never taken back: characters complete, stop strings cut off."""

from __future__ import annotations

from minillm.model.tokenizer import Detokenizer, Tokenizer
from minillm.outputs import CompletionOutput


class TextStream:
    """Writes the text of one completion as its tokens come.

    What might be the beginning of a stop string is held back until the next tokens tell. So a reader of the stream
    sees neither half a character nor half a stop string.
    """

    def __init__(self, output: CompletionOutput, tokenizer: Tokenizer, stop_strings: tuple[str, ...]) -> None:
        self.output = output
        self.stop_strings = stop_strings
        self._detokenizer = Detokenizer(tokenizer)
        self._held = ""

    def push(self, token: int) -> str | None:
        """Add one token. Returns the stop string that it completes, if any: the text then ends before it."""
        text = self._held + self._detokenizer.push([token])
        hits = [(text.find(stop), stop) for stop in self.stop_strings if stop in text]
        if hits:
            position, stop = min(hits)
            self._show(text[:position], held="")
            return stop
        hold = max((_overlap(text, stop) for stop in self.stop_strings), default=0)
        self._show(text[: len(text) - hold], held=text[len(text) - hold :])
        return None

    def close(self) -> None:
        """The completion ended without a stop string: show what was held back."""
        self._show(self._held + self._detokenizer.flush(), held="")

    def _show(self, text: str, *, held: str) -> None:
        self.output.text += text
        self._held = held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
