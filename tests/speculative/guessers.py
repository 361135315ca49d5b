"""Proposers for tests: from always wrong to always right."""

from __future__ import annotations

import random
from collections.abc import Mapping

from minillm.engine.request import Request
from minillm.engine.verify import Draft
from tests.engine.workloads import VOCAB, Completions


class Guesser:
    """Guesses from a list of what will really be said, some of it spoiled; says nothing for some requests at times."""

    def __init__(self, truth: Completions, right: float, seed: int = 0, silent: float = 0.0) -> None:
        self.truth, self.right, self.silent = truth, right, silent
        self.rng = random.Random(seed)

    def propose(self, room: Mapping[Request, int]) -> dict[Request, Draft]:
        return {r: Draft(self._guess(r, count)) for r, count in room.items() if self.rng.random() >= self.silent}

    def _guess(self, request: Request, count: int) -> list[int]:
        said = self.truth[request.request_id, request.index][request.num_generated :]
        guess = [*said, *[0] * count][: self.rng.randint(0, count) if self.silent else count]
        return [token if self.rng.random() < self.right else self.rng.randrange(VOCAB) for token in guess]

    def forget(self, request: Request) -> None:
        pass

    def reset(self) -> None:
        pass
