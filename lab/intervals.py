"""Means, intervals and p-values of Student's t over the seeds.

Each seed draws other scenes for the student, another projector and another order. A difference of two rows is
paired, since both have the same scenes and orders; the test questions are the same for all.
"""

import functools
import math
import statistics


def chance(t: float, freedom: int) -> float:
    """That |Student's t| is as large or larger (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle, odd = math.atan(abs(t) / math.sqrt(freedom)), freedom % 2
    term, total = math.sin(angle) * (math.cos(angle) if odd else 1), 0.0
    for k in range(freedom // 2):
        total += term
        term *= math.cos(angle) ** 2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    return 1 - (2 / math.pi * (angle + total) if odd else total)


@functools.cache
def t_975(freedom: int) -> float:
    """The 97.5 % point of Student's t, by bisection."""
    low, high = 0.0, 20.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if chance(middle, freedom) > 0.05 else (low, middle)
    return high


def interval(values: list[float]) -> tuple[float, float]:
    """The mean and half of its 95 % interval, which one value has not: nan."""
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return mean, math.nan
    return mean, t_975(n - 1) * statistics.stdev(values) / math.sqrt(n)


def p_value(values: list[float], n: int | None = None) -> float:
    """Of the mean's being 0; with `n`, of so many values with the same mean and spread."""
    n, mean = n or len(values), statistics.fmean(values)
    if n == 1:
        return 1.0
    spread = statistics.stdev(values)
    return chance(mean * math.sqrt(n) / spread, n - 1) if spread else float(mean == 0)


def holm(p: list[float]) -> list[float]:
    """P-values corrected for their number: below 0.05, the chance that any of them is a true null is so."""
    corrected, most = [0.0] * len(p), 0.0
    for k, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        most = max(most, min(1.0, (len(p) - k) * p[i]))
        corrected[i] = most
    return corrected


def grouped(rows: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """The seeds of each row of the table and number of scenes."""
    groups: dict[tuple[str, int], list[dict]] = {}
    for row in sorted(rows, key=lambda r: (r["scenes"], r["seed"])):
        groups.setdefault((row["method"], row["scenes"]), []).append(row)
    return groups
