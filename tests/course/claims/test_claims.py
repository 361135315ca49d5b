"""The scoreboard: all claims are there, counts come out as predicted, and no verdict is a constant.

Verdicts about counts are asserted. Verdicts about speed are computed here for a simulated machine whose steps take
exactly as long as their bounds; what they are on a real one is printed by `minillm claims` and asserted nowhere.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from minillm.costs.steps import decode_step
from minillm.course.claims import CLAIMS, Card, Finding, Workbench
from minillm.course.claims.card import claim as make_claim
from minillm.measure.hardware import Hardware
from minillm.measure.machine import describe_machine
from minillm.measure.roof import Roof, step_seconds
from minillm.model.decoder import Decoder

VERDICTS = {  # of claims about counts: what must come out on every machine
    "holds": "A2 B4 B5 B6 B10",
    "holds when": "A1 A3 A4 A6 A8 A10 A11 A13 A14 A16 A17 A18 A20 A21 A22 B3 B11 B15",
    "wrong": "A5 A12 A19 B1 B2 B7 B13",
}
COUNTED = {id: kind for kind, ids in VERDICTS.items() for id in ids.split()}
TIMED = ["A7", "A9", "A15", "A23", "A24", "B8", "B9", "B12", "B14"]

ALTERED: dict[str, dict[str, float | str]] = {  # measurements that must change the verdict; a name copies another
    "A1": {"difference": 1.0},
    "A2": {"decodes": 12},  # the mutant: M decode steps
    "A3": {"per_pass": 1},
    "A4": {"by_token": 3},
    "A5": {"before": 20},
    "A6": {"rows_16": 1},
    "A8": {"chunked": 1},
    "A10": {"sixteen": 15.1},
    "A11": {"second": "first"},
    "A12": {"late": 0.0},
    "A13": {"window": 2.0},
    "A14": {"last": 100.0},
    "A16": {"short": 4.0},
    "A17": {"share": 90.0},
    "A18": {"class": 1.0},
    "A19": {"flops": 0.5},
    "A20": {"kv": 8.0},
    "A21": {"short": 1.9},
    "A22": {"attention": 16.0, "paged": 0.5},
    "B1": {"mixed": 0},
    "B2": {"marked": 2},
    "B3": {"ragged": 120},
    "B4": {"pairs": 32 * 32},  # the mutant: no causal rule
    "B5": {"bytes": 2 * 245760},  # the mutant: query heads instead of KV heads
    "B6": {"without": "with"},
    "B7": {"second": "first"},
    "B10": {"difference": 5.0},
    "B11": {"one": 99.0},
    "B13": {"written": 0.0},
    "B15": {"apart": 40},
}


def roof() -> Roof:
    return Roof(flops_per_second=100e9, bytes_per_second=10e9)


class Simulated(Workbench):
    """A machine whose every step takes as long as its bound, but for a lone decode of the tiny model: ten times.

    Its timed model is the embedded one; the wider twin of that moves and takes twice as much.
    """

    def __init__(self, slower: dict[str, float] | None = None) -> None:
        super().__init__()
        self.slower = slower or {}

    @property
    def timed(self) -> Decoder:  # type: ignore[override]
        return self.tiny

    @property
    def hardware(self) -> Hardware:  # type: ignore[override]
        machine = describe_machine(self.tiny.device)
        return Hardware(machine, roof().bytes_per_second, 10e9, {"float32": roof().flops_per_second}, 1e-6, "")

    @property
    def roof(self) -> Roof:
        return roof()

    def seconds(self, name: str) -> float:
        steps = self.timed_steps | {"decode, tiny": decode_step(128), "decode, wide": decode_step(128)}
        bound = step_seconds(self.tiny.config, steps[name], 4, roof())
        factors = {"decode, tiny": 10.0, "decode, wide": 2.0}
        return self.slower.get(name, 1.0) * factors.get(name, 1.0) * bound


@cache
def bench() -> Simulated:
    return Simulated()


@cache
def card(id: str) -> Card:
    return CLAIMS[id].card(bench())


def altered(original: Card, numbers: dict[str, float | str]) -> Card:
    """The same card with other measurements."""
    findings = dict(original.findings)
    for key, value in numbers.items():
        other = findings[value].measured if isinstance(value, str) else value
        findings[key] = findings[key]._replace(measured=other)
    return original.claim.judge(findings)


def test_every_claim_has_its_card() -> None:
    assert list(CLAIMS) == [f"A{i}" for i in range(1, 25)] + [f"B{i}" for i in range(1, 16)]
    assert set(COUNTED) | set(TIMED) == set(CLAIMS)
    assert {id for id, claim in CLAIMS.items() if claim.depends_on_speed} == set(TIMED)


@pytest.mark.parametrize("id", COUNTED)
def test_counts_come_out_as_predicted(id: str) -> None:
    """Exactly: no tolerance but that of a float's last digits."""
    for finding in card(id).findings.values():
        if finding.predicted is not None:
            assert finding.measured == pytest.approx(finding.predicted, rel=1e-12, abs=0), finding.what


@pytest.mark.parametrize("id, kind", COUNTED.items())
def test_verdicts_about_counts(id: str, kind: str) -> None:
    assert card(id).kind == kind, card(id).verdict


@pytest.mark.parametrize("id", COUNTED)
def test_no_verdict_is_a_constant(id: str) -> None:
    original = card(id)
    assert altered(original, {}).verdict == original.verdict
    assert ALTERED[id].keys() <= original.findings.keys()
    assert altered(original, ALTERED[id]).verdict != original.verdict


SIMULATED = {  # claim: its verdict at the bounds, slow-downs that change it, and the verdict then
    "A7": ("holds when", {"prefill, few": 9.0}, "holds"),
    "A9": ("holds when", {"decode": 5.0}, "wrong"),
    "A24": ("holds", {"prefill, many": 100.0}, "wrong"),
    "B12": ("holds when", {"decode, batch 16": 20.0}, "wrong"),
    "B14": ("wrong", {"decode, wide": 0.5}, "holds"),
    "A23": ("holds", {"verify, batch 16": 2.0}, "holds when"),
}


@pytest.mark.parametrize("id", SIMULATED)
def test_verdicts_about_speed_follow_the_times(id: str) -> None:
    at_the_bounds, slower, then = SIMULATED[id]
    first, other = (CLAIMS[id].card(machine) for machine in (bench(), Simulated(slower)))
    assert (first.kind, other.kind) == (at_the_bounds, then)


@pytest.mark.parametrize(
    "id, numbers, kind",
    [
        ("A15", {"quiet": 1.1, "stalled": 30.0}, "holds when"),
        ("A15", {"quiet": 1.1, "stalled": 1.2}, "holds"),
        ("B8", {"mfu_few": 5, "mbu_few": 50, "mfu_many": 70, "mbu_many": 10}, "holds when"),
        ("B8", {"mfu_few": 5, "mbu_few": 50, "mfu_many": 7, "mbu_many": 10}, "wrong"),
        ("B9", {"long": 90.0, "short": 2.0}, "holds when"),
        ("B9", {"long": 90.0, "short": 60.0}, "holds"),
    ],
)
def test_verdicts_about_waiting_follow_the_times(id: str, numbers: dict[str, float], kind: str) -> None:
    findings = {key: Finding(key, None, value) for key, value in numbers.items()}
    assert CLAIMS[id].judge(findings).kind == kind


def test_every_word_fits() -> None:
    """80 columns: a short name for each number, a statement that fits into three lines."""
    for id in COUNTED:
        assert all(len(finding.what) <= 48 for finding in card(id).findings.values()), id
    for claim in CLAIMS.values():
        assert claim.says.endswith(".") and len(claim.says) < 160
        assert not claim.otherwise.endswith(".") and claim.heard and claim.formula


def test_a_verdict_says_when() -> None:
    toy = make_claim(
        "X1",
        says="",
        heard="",
        formula="",
        otherwise="it falls",
        cases={
            "cold": lambda p, m: m["x"] == p["x"],
            "warm": lambda p, m: m["y"] > 0,
        },
    )(lambda bench: {})
    numbers = {"x": Finding("x", 1, 1), "y": Finding("y", None, 0)}
    assert toy.judge(numbers).verdict == "holds when cold. Not when warm: it falls"
    assert toy.judge(numbers | {"y": Finding("y", None, 1)}).verdict == "holds"
    assert toy.judge(numbers | {"x": Finding("x", 1, 2)}).verdict == "wrong: it falls"
    assert replace(toy, id="X2").judge(numbers).to_json()["cases"] == {"cold": True, "warm": False}
