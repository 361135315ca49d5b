"""Guess by looking back: what followed when the text last ended in the same tokens?

Prompt lookup: no second model, no arithmetic. Code, quotes, edits and lists repeat themselves; prose rarely does. The
longest end of the text that also stands earlier in it is found with a suffix automaton, which grows by a token in
constant time on average (Blumer et al. 1985; for drafting: Hu et al. 2024, arXiv:2411.10666). A scan would take longer
with every token.
"""

from __future__ import annotations

from collections.abc import Mapping

from minillm.engine.request import Request
from minillm.engine.verify import Draft


class SuffixIndex:
    """The longest end of a growing text that also stands earlier in it.

    A suffix automaton: state s stands for pieces of text that end at the same places, the longest of `_length[s]`
    tokens; `_link[s]` is the state of its longest end that stands at more places. So the link of the whole text's
    state is the answer. `_end[s]` is the place after one of the earlier occurrences, the latest that was looked up.
    """

    def __init__(self) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._end = [0]
        self._last = 0  # the state of the whole text
        self.num_matched = 0  # length of the longest end that stands earlier, too
        self.source = 0  # the place after that earlier occurrence

    @property
    def num_tokens(self) -> int:
        """Length of the text."""
        return self._length[self._last]

    def append(self, token: int) -> None:
        """Add one token after the text."""
        place = self.num_tokens + 1
        new = self._state({}, link=0, length=place, end=place)
        state = self._last
        while state != -1 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        if state != -1:
            self._link[new] = self._exactly(state, token)
        self._last, match = new, self._link[new]
        self.num_matched, self.source = self._length[match], self._end[match]
        self._end[match] = place

    def _exactly(self, state: int, token: int) -> int:
        """The state of `state`'s longest piece with this token after it, split off if it is shared."""
        target, length = self._next[state][token], self._length[state] + 1
        if self._length[target] == length:
            return target
        clone = self._state(dict(self._next[target]), self._link[target], length, self._end[target])
        self._link[target] = clone
        while state != -1 and self._next[state].get(token) == target:
            self._next[state][token] = clone
            state = self._link[state]
        return clone

    def _state(self, following: dict[int, int], link: int, length: int, end: int) -> int:
        self._next.append(following)
        self._link.append(link)
        self._length.append(length)
        self._end.append(end)
        return len(self._link) - 1


class NgramProposer:
    """Guesses that what followed the longest repeated end will follow again.

    min_match: a repetition of fewer tokens is taken for chance, and nothing is proposed. Costs a constant time for each
    token of the text, once, and no forward pass.
    """

    def __init__(self, min_match: int = 2) -> None:
        self.min_match = min_match
        self._indices: dict[Request, SuffixIndex] = {}

    def propose(self, room: Mapping[Request, int]) -> dict[Request, Draft]:
        """A draft of full length for each request whose end stands earlier in its text; none for the others."""
        drafts = {}
        for request, count in room.items():
            index = self._caught_up(request)
            if index.num_matched >= self.min_match:
                drafts[request] = Draft(continuation(request.tokens, index.source, count))
        return drafts

    def _caught_up(self, request: Request) -> SuffixIndex:
        """The request's index, grown by what is new in it."""
        index = self._indices.setdefault(request, SuffixIndex())
        for token in request.tokens[index.num_tokens :]:
            index.append(token)
        return index

    def forget(self, request: Request) -> None:
        """Drop the index of a request that has ended."""
        self._indices.pop(request, None)

    def reset(self) -> None:
        """Drop all indices."""
        self._indices.clear()


def continuation(tokens: list[int], source: int, count: int) -> list[int]:
    """What follows if `tokens` go on as they did from place `source`.

    At the end of the text it copies its own guesses, as LZ77 does: a text that repeats with period n goes on with
    period n.
    """
    period = len(tokens) - source
    return [tokens[source + step % period] for step in range(count)]
