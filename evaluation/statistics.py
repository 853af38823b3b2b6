"""Paired comparisons of runs: differences, their intervals, and how likely chance alone is.

Runs are paired by what they share, such as (order of the tasks, seed): what differs then is the
method.
"""

import itertools
import math
import random
import statistics
from dataclasses import dataclass

# Sign flips are counted one by one up to 2 ** this many, and drawn beyond it.
EXACT_PAIRS = 14
DRAWS = 10_000


@dataclass
class Difference:
    """Of `pairs` pairs: the mean difference, its 95 % interval, and p of a two-sided test."""

    pairs: int
    mean: float
    low: float
    high: float
    p: float


def paired_difference(ours: dict, theirs: dict, seed: int = 0) -> Difference | None:
    """Ours minus theirs over the keys that both have with a number; None without such a key.

    The interval is the percentile bootstrap over pairs (Efron 1979), NaN from one pair; p is that
    of the sign-flip permutation test of a mean of zero (Fisher 1935), exact for few pairs.
    """
    keys = [key for key in ours if key in theirs]
    differences = [ours[key] - theirs[key] for key in keys]
    differences = [d for d in differences if not math.isnan(d)]
    if not differences:
        return None
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return Difference(1, mean, math.nan, math.nan, math.nan)
    pick = random.Random(seed).choices
    size = len(differences)
    means = sorted(statistics.fmean(pick(differences, k=size)) for _ in range(DRAWS))
    tail = int(0.025 * DRAWS)
    return Difference(size, mean, means[tail], means[-1 - tail], _sign_flip_p(differences, seed))


def _sign_flip_p(differences: list[float], seed: int) -> float:
    """The share of sign patterns whose sum is at least as far from zero as the one seen."""
    seen = abs(math.fsum(differences)) * (1 - 1e-12)
    if len(differences) <= EXACT_PAIRS:
        totals = map(math.fsum, itertools.product(*((d, -d) for d in differences)))
        return sum(abs(total) >= seen for total in totals) / 2 ** len(differences)
    pick = random.Random(seed).choice
    drawn = (math.fsum(pick((1, -1)) * d for d in differences) for _ in range(DRAWS))
    # The pattern that was seen is one of all.
    return (1 + sum(abs(total) >= seen for total in drawn)) / (1 + DRAWS)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Each p corrected for that many comparisons (Holm 1979); NaN stays and does not count."""
    known = sorted((p, name) for name, p in p_values.items() if not math.isnan(p))
    corrected, highest = dict.fromkeys(p_values, math.nan), 0.0
    for rank, (p, name) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        corrected[name] = highest
    return {name: corrected[name] for name in p_values}
