"""Paired comparisons of runs: differences, their intervals, and how likely chance alone is.

Runs are paired by what they share, such as (order of the tasks, seed): what differs then is the
method.
"""

import itertools
import math
import random
import statistics
from dataclasses import dataclass

# With fewer no p can reach 0.05, and a bootstrap's interval is far too narrow.
FEWEST_PAIRS = 6
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

    A key is (order, seed). The interval is the percentile bootstrap over orders and over seeds,
    each drawn by itself (Owen 2007, "The pigeonhole bootstrap"): pairs that share one are alike.
    NaN from fewer than `FEWEST_PAIRS`. p is that of the sign-flip permutation test of a mean of
    zero (Fisher 1935), exact for few pairs, as if pairs were independent; NaN from one.
    """
    keys = [key for key in ours if key in theirs and not math.isnan(ours[key] - theirs[key])]
    if not keys:
        return None
    found = {key: ours[key] - theirs[key] for key in keys}
    differences = list(found.values())
    mean, reference = statistics.fmean(differences), statistics.fmean(theirs[key] for key in keys)
    low, high = _interval(found, seed) if len(keys) >= FEWEST_PAIRS else (math.nan, math.nan)
    p = _sign_flip_p(differences, seed) if len(keys) > 1 else math.nan
    return Difference(len(keys), reference, mean, low, high, p)


def _interval(differences: dict[tuple, float], seed: int) -> tuple[float, float]:
    """Of the mean, 95 %, by drawing orders and seeds anew."""
    pick = random.Random(seed).choices
    orders, seeds = (list(dict.fromkeys(part)) for part in zip(*differences, strict=True))
    means = []
    while len(means) < DRAWS:
        cells = itertools.product(pick(orders, k=len(orders)), pick(seeds, k=len(seeds)))
        if drawn := [differences[cell] for cell in cells if cell in differences]:
            means.append(statistics.fmean(drawn))
    means.sort()
    tail = int(0.025 * DRAWS)
    return means[tail], means[-1 - tail]


def least_p(pairs: int) -> float:
    """The smallest p that so many pairs can have: all differences of one sign, or all of the other.

    Fewer than `FEWEST_PAIRS` cannot reach 0.05.
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
