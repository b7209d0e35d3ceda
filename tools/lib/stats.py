"""The statistics behind record claims: t-tests, how many runs a claim needs, and a rule for
stopping an A/B early."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

ALPHA = 0.01  # a claim holds when p is below this
MINIMUM_PAIRS = 5


def p_below(values: Sequence[float], bound: float = 0.0) -> float:
    """p of the one-sided one-sample t-test: how likely a sample this far below is when the true mean is
    `bound`.

    1 for fewer than two values, and for values without any spread: copies of one value prove nothing.
    """
    if len(values) < 2 or np.ptp(values) == 0:
        return 1.0
    x = np.asarray(values, dtype=np.float64) - bound
    mean, error = x.mean(), x.std(ddof=1) / math.sqrt(len(x))
    return float(stats.t.cdf(mean / error, len(x) - 1))


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Two-sided t confidence interval of the mean."""
    if len(values) < 2:
        return -math.inf, math.inf
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def describe(values: Sequence[float]) -> dict[str, Any]:
    """n, mean, sd (of one value; null for a single one), median."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"n": len(values), "mean": float(np.mean(values)), "sd": sd, "median": float(np.median(values))}


def welch(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """mean(a) - mean(b), its 95% interval and the two-sided p of Welch's test (variances may
    differ); nulls below n = 2."""
    difference = float(np.mean(a) - np.mean(b))
    if min(len(a), len(b)) < 2 or np.ptp(a) == np.ptp(b) == 0:
        return {"difference": difference, "low": None, "high": None, "p": None}
    test = stats.ttest_ind(a, b, equal_var=False)
    ends = test.confidence_interval(0.95)
    return {
        "difference": difference,
        "low": float(ends.low),
        "high": float(ends.high),
        "p": float(test.pvalue),
    }


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Mean of a - b, pair by pair, its 95% t interval and two-sided p; nulls but for the mean below
    two pairs."""
    d = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if len(d) < 2:
        return {"difference": float(d.mean()), "low": None, "high": None, "p": None}
    low, high = interval(d)
    return {
        "difference": float(d.mean()),
        "low": low,
        "high": high,
        "p": min(1.0, 2 * min(p_below(d), p_below(-d))),
    }


def ratio(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """sum(a) / sum(b) of pairs and its 95% interval: the ratio estimator (Cochran 1977, chapter 6),
    t with n - 1 degrees."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    found, n = x.sum() / y.sum(), len(x)
    error = math.sqrt(n * ((x - found * y) ** 2).sum() / (n - 1)) / y.sum()
    half = stats.t.ppf(0.975, n - 1) * error
    return {"ratio": float(found), "low": float(found - half), "high": float(found + half)}


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p of each test when the chance of any false one among all of
    them counts (Holm 1979)."""
    order = np.argsort(values)
    adjusted = np.maximum.accumulate((len(values) - np.arange(len(values))) * np.asarray(values)[order])
    result = np.empty(len(values))
    result[order] = np.minimum(adjusted, 1.0)
    return result.tolist()


def runs_needed(sd: float, margin: float, power: float, alpha: float = ALPHA) -> int:
    """Smallest n whose one-sided t-test gives p < alpha with probability `power` (noncentral t distribution).

    sd and margin in the same unit: spread of one run, distance of the true mean below the target.
    """
    if not (sd > 0 and margin > 0 and 0 < power < 1 and 0 < alpha < 1):
        raise ValueError("sd and margin are positive and power lies between 0 and 1")

    def reaches(n: int) -> bool:
        return stats.nct.sf(stats.t.isf(alpha, n - 1), n - 1, math.sqrt(n) * margin / sd) >= power

    high = 2
    while not reaches(high):
        high *= 2
        if high > 1_000_000:
            raise ValueError("more than a million runs would be needed; the margin is too small for this sd")
    low = high // 2  # the power grows with n: bisect between a failure and a success
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def looks(most: int) -> list[int]:
    """Numbers of values after which the sequential rule looks: 5, 7, 10, 14, 20, 28, ... up to `most`."""
    return [n for k in range(64) if (n := round(MINIMUM_PAIRS * 2 ** (k / 2))) <= most]


def sequential(values: Sequence[float]) -> dict[str, Any]:
    """Is the mean below or above 0, judged at looks that were fixed in advance; valid whenever one stops.

    Look k = 1, 2, ... happens after 5, 7, 10, 14, 20, ... values (`looks`) and may spend alpha / (k (k +
    1)) of the error alpha: alpha / 2, alpha / 6, alpha / 12, ... These sum to alpha, so by the union
    bound the chance that any look, however many there are, declares a mean of 0 to be below it is at
    most alpha; whatever stopped the experiment, and whatever is looked at in between, changes nothing,
    because between looks nothing is decided. (Alpha spending as by Lan and DeMets 1983, with the bound
    instead of the joint distribution, so that no dependence between looks is assumed.)

    Returns, from the looks made so far: `p_below` and `p_above`, the smallest k (k + 1) p_k, to be
    compared with alpha; `low` and `high`, the interval of the last look at level 1 - 0.05 / (k (k + 1)),
    which by the same argument holds at all looks at once with 95%; `n`, the values it used.
    """
    result = {"n": 0, "p_below": 1.0, "p_above": 1.0, "low": -math.inf, "high": math.inf}
    for k, n in enumerate(looks(len(values)), 1):
        part, weight = np.asarray(values[:n]), k * (k + 1)
        low, high = interval(part, 1 - 0.05 / weight)
        result = {
            "n": n, "low": low, "high": high,
            "p_below": min(result["p_below"], weight * p_below(part)),
            "p_above": min(result["p_above"], weight * p_below(-part)),
        }  # fmt: skip
    return result
