"""What everybody says about prefill and decode, tried on the real engine: one card per claim.

    from minillm.course.claims import CLAIMS, Workbench
    bench = Workbench()
    print(CLAIMS["B11"].card(bench).verdict)

`minillm claims` prints the scoreboard.
"""

from __future__ import annotations

from minillm.course.claims import cache, intensity, latency, phases, serving, techniques, tokens
from minillm.course.claims.card import Card, Claim, Finding
from minillm.course.claims.workbench import Workbench

__all__ = ["CLAIMS", "Card", "Claim", "Finding", "Workbench"]

_MODULES = (phases, tokens, intensity, cache, latency, techniques, serving)


def _order(claim: Claim) -> tuple[str, int]:
    return claim.id[0], int(claim.id[1:])


CLAIMS: dict[str, Claim] = {
    claim.id: claim
    for claim in sorted((c for module in _MODULES for c in vars(module).values() if isinstance(c, Claim)), key=_order)
}
