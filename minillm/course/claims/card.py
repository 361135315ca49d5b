"""A claim as a card: what is said, what a formula predicts, what was measured, and the verdict computed from the two.

A claim is tried in one or more *cases*. Each case is a question to the numbers that the claim answers with yes. Yes
everywhere is "holds", yes in some is "holds when …", no everywhere is "wrong: …". Nobody writes a verdict down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from minillm.measure.units import number, quantity

if TYPE_CHECKING:
    from minillm.course.claims.workbench import Workbench

SCALED = ("B", "FLOP")  # units that take a prefix of the SI
Numbers = Mapping[str, float]
Case = Callable[[Numbers, Numbers], bool]  # (predicted, measured): is it here as the claim says?


class Finding(NamedTuple):
    """One number of a card. `predicted` is None where no formula tells it beforehand."""

    what: str
    predicted: float | None
    measured: float
    unit: str = ""

    def text(self, value: float) -> str:
        """One of its values with the unit, and no more digits than it deserves; counts in full."""
        if self.unit in SCALED:
            return quantity(value, self.unit)
        return (
            f"{value:,.0f} {self.unit}".strip() if float(value).is_integer() else f"{number(value)} {self.unit}".strip()
        )


Measure = Callable[["Workbench"], dict[str, Finding]]


@dataclass(frozen=True)
class Claim:
    """Something that is said about prefill and decode, and how to find out.

    says: the statement, in our own words. heard: where one meets it. formula: what the prediction comes from.
    otherwise: what is true where the claim fails. cases: by the condition that each of them stands for.
    depends_on_speed: whether another machine may come to another verdict; if not, tests assert it.
    """

    id: str
    says: str
    heard: str
    formula: str
    otherwise: str
    cases: Mapping[str, Case]
    measure: Measure
    depends_on_speed: bool

    def card(self, bench: Workbench) -> Card:
        """Measure, then judge."""
        return self.judge(self.measure(bench))

    def judge(self, findings: dict[str, Finding]) -> Card:
        """The card for these numbers."""
        predicted = {key: finding.predicted for key, finding in findings.items() if finding.predicted is not None}
        measured = {key: finding.measured for key, finding in findings.items()}
        return Card(self, findings, {name: case(predicted, measured) for name, case in self.cases.items()})


@dataclass(frozen=True)
class Card:
    """A claim that was tried."""

    claim: Claim
    findings: dict[str, Finding]
    cases: dict[str, bool]

    @property
    def kind(self) -> str:
        """ "holds", "holds when" or "wrong"."""
        if all(self.cases.values()):
            return "holds"
        return "holds when" if any(self.cases.values()) else "wrong"

    @property
    def verdict(self) -> str:
        """The verdict as a sentence."""
        if self.kind == "holds":
            return "holds"
        if self.kind == "wrong":
            return f"wrong: {self.claim.otherwise}"
        return f"holds when {self._cases(True)}. Not when {self._cases(False)}: {self.claim.otherwise}"

    def _cases(self, wanted: bool) -> str:
        return "; ".join(name for name, holds in self.cases.items() if holds == wanted)

    def to_json(self) -> dict[str, Any]:
        """Everything on the card as plain data."""
        claim = self.claim
        return {
            "id": claim.id,
            "says": claim.says,
            "heard": claim.heard,
            "formula": claim.formula,
            "depends_on_speed": claim.depends_on_speed,
            "findings": {key: finding._asdict() for key, finding in self.findings.items()},
            "cases": self.cases,
            "kind": self.kind,
            "verdict": self.verdict,
        }


def claim(
    id: str,
    *,
    says: str,
    heard: str,
    formula: str,
    otherwise: str,
    cases: Mapping[str, Case],
    depends_on_speed: bool = False,
) -> Callable[[Measure], Claim]:
    """Turn a function that measures into the claim that it is about. `id` is the number in the course's list."""
    return lambda measure: Claim(id, says, heard, formula, otherwise, cases, measure, depends_on_speed)


def always(case: Case) -> dict[str, Case]:
    """The only case of a claim that is meant without conditions."""
    return {"always": case}
