"""Numbers as people read them: three digits that matter, and a prefix of the SI."""

from __future__ import annotations

PREFIXES = ((12, "T"), (9, "G"), (6, "M"), (3, "k"), (0, ""), (-3, "m"), (-6, "µ"), (-9, "n"))


def number(value: float) -> str:
    """Three significant digits without an exponent: 0.00123, 4.56, 78.9, 12345."""
    digits = 0
    while digits < 9 and 0 < abs(value) * 10**digits < 99.95:
        digits += 1
    return f"{value:.{digits}f}"


def quantity(value: float, unit: str) -> str:
    """Three significant digits and a prefix of the SI: quantity(44.7e9, "B/s") is "44.7 GB/s"."""
    exponent, prefix = next(((e, p) for e, p in PREFIXES if abs(value) >= 10**e), (0, ""))
    return f"{number(value / 10**exponent)} {prefix}{unit}"
