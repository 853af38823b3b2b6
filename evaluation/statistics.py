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
    """Of `pairs` pairs: the mean difference, its 95 % interval, and p of a two-sided test.

    Attributes:
        theirs: the mean that the difference is against, over the same pairs.
    """

    pairs: int
    theirs: float
    mean: float
    low: float
    high: float
    p: float


def paired_difference(ours: dict, theirs: dict, seed: int = 0) -> Difference | None:
    """Ours minus theirs over the keys that both have with a number; None without such a key.

    The interval is the percentile bootstrap over pairs (Efron 1979), NaN from one pair; p is that
    of the sign-flip permutation test of a mean of zero (Fisher 1935), exact for few pairs.
    """
    keys = [key for key in ours if key in theirs and not math.isnan(ours[key] - theirs[key])]
    differences = [ours[key] - theirs[key] for key in keys]
    if not differences:
        return None
    mean, reference = statistics.fmean(differences), statistics.fmean(theirs[key] for key in keys)
    if len(differences) == 1:
        return Difference(1, reference, mean, math.nan, math.nan, math.nan)
    pick = random.Random(seed).choices
    size = len(differences)
    means = sorted(statistics.fmean(pick(differences, k=size)) for _ in range(DRAWS))
    tail = int(0.025 * DRAWS)
    p = _sign_flip_p(differences, seed)
    return Difference(size, reference, mean, means[tail], means[-1 - tail], p)


def least_p(pairs: int) -> float:
    """The smallest p that so many pairs can have: all differences of one sign, or all of the other.

    Fewer than 6 pairs cannot reach 0.05.
    """
    return 2 / 2**pairs


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
