"""What went wrong? The exercise's mutants, run on the very same inputs, say it: equal output, equal mistake."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from zlib import crc32

from minillm.course.lab.checks import Case, Check
from minillm.course.lab.compare import same
from minillm.course.lab.exercises import Exercise, Mutant
from minillm.course.lab.protocol import Reply
from minillm.course.lab.sandbox import Sandbox

OURS_S = 4.0  # for a version of our own: one that loops need not be waited for as long as a learner's


def draw(exercise: Exercise, check: Check, seed: int) -> Case:
    """The inputs of a check: fresh ones for each seed, the same ones for everybody under one seed."""
    return check.case(crc32(f"{seed} {exercise.id} {check.name}".encode()), exercise.helpers())


def run(
    sandbox: Sandbox, exercise: Exercise, check: Check, case: Case, source: str, seconds: float = math.inf
) -> Reply:
    """Run one check's script on a source, for as long as the check allows, or `seconds` if that is less."""
    script = case.script(
        given=exercise.given,
        banned_modules=exercise.banned_modules,
        banned_operations=exercise.banned_operations,
        limits=replace(check.limits, seconds=min(check.limits.seconds, seconds)),
    )
    return sandbox.run(source, script, exercise.file_name)


class Diagnosis:
    """Knows what each mutant answers to each check under one seed. A mutant runs when it is first asked for."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._sandboxes: dict[tuple[str, ...], Sandbox] = {}
        self._replies: dict[tuple[str, str, str], Reply] = {}

    def close(self) -> None:
        """End the mutants' workers."""
        for sandbox in self._sandboxes.values():
            sandbox.close()

    def likely(self, exercise: Exercise, replies: Mapping[Check, Reply], check: Check) -> Mutant | None:
        """The mutant whose reply to a failed check equals the learner's.

        If there are several, the one that agrees with the learner on most of the other checks.
        """
        alike = [mutant for mutant in exercise.mutants if self._agrees(exercise, mutant, check, replies[check])]
        if len(alike) < 2:
            return alike[0] if alike else None
        return max(
            alike, key=lambda mutant: sum(self._agrees(exercise, mutant, other, replies[other]) for other in replies)
        )

    def _agrees(self, exercise: Exercise, mutant: Mutant, check: Check, reply: Reply) -> bool:
        return _alike(reply, self._reply(exercise, mutant, check))

    def _reply(self, exercise: Exercise, mutant: Mutant, check: Check) -> Reply:
        key = exercise.id, mutant.name, check.name
        if key not in self._replies:
            sandbox = self._sandboxes.setdefault(exercise.preload, Sandbox(preload=exercise.preload))
            source = mutant.source(exercise.solution.read_text(encoding="utf8"))
            self._replies[key] = run(sandbox, exercise, check, draw(exercise, check, self.seed), source, OURS_S)
        return self._replies[key]


def _alike(reply: Reply, other: Reply) -> bool:
    """The same end, the same kind of error, the same values."""
    return (
        reply.status == other.status
        and reply.error.get("type") == other.error.get("type")
        and len(reply.values) == len(other.values)
        and all(map(same, reply.values, other.values))
    )
