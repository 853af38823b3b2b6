"""Paired differences by hand, by simulation, and Holm's correction by its definition."""

import itertools
import math
import random

import pytest

from evaluation import statistics
from evaluation.statistics import holm, least_p, paired_difference


def test_only_runs_that_have_a_partner_count():
    a, b, c, d = itertools.product("xy", (1, 2))
    found = paired_difference({a: 1.0, b: 3.0, c: 9.0, d: 2.0}, {a: 0.5, b: 1.0, d: math.nan})
    assert found.pairs == 2 and found.mean == pytest.approx(1.25)
    assert found.theirs == pytest.approx(0.75) and found.p == 0.5
    # An interval from so few would be far too narrow.
    assert math.isnan(found.low) and math.isnan(found.high)
    assert paired_difference({a: 1.0}, {b: 1.0}) is None


def test_one_pair_has_no_interval():
    found = paired_difference({("x", 1): 1.0}, {("x", 1): 3.0})
    assert (found.pairs, found.mean) == (1, -2.0)
    assert all(map(math.isnan, (found.low, found.high, found.p)))


@pytest.mark.parametrize("size", [3, 5, 14])
def test_p_of_differences_of_one_sign_is_two_patterns_of_all(size):
    ours = {("x", i): 1.0 + i for i in range(size)}
    assert paired_difference(ours, dict.fromkeys(ours, 0.0)).p == pytest.approx(2 / 2**size)
    assert least_p(size) == pytest.approx(2 / 2**size)


def test_p_of_many_pairs_is_drawn_and_agrees_with_the_exact_one():
    rng = random.Random(1)
    ours = {("x", i): rng.gauss(0.5, 1) for i in range(15)}
    found = paired_difference(ours, dict.fromkeys(ours, 0.0)).p
    # By the normal approximation of the same statistic.
    spread = math.sqrt(sum(value**2 for value in ours.values()))
    expected = math.erfc(abs(sum(ours.values())) / spread / math.sqrt(2))
    assert found == pytest.approx(expected, abs=0.03)


def test_the_interval_holds_the_truth_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 400)
    rng, inside = random.Random(2), 0
    for trial in range(40):
        ours = {("x", i): rng.gauss(0.3, 1) for i in range(20)}
        found = paired_difference(ours, dict.fromkeys(ours, 0.0), seed=trial)
        inside += found.low <= 0.3 <= found.high
    assert 34 <= inside <= 40


def test_pairs_that_share_a_seed_or_an_order_are_no_more_than_their_number():
    """Three orders with each seed's own difference say what the seeds do, and no more."""
    of_seed = dict(enumerate([0.1, 0.5, 0.9, 0.2, 0.4, 0.7]))
    alone = {("x", i): value for i, value in of_seed.items()}
    thrice = {(order, i): value for order in "xyz" for i, value in of_seed.items()}
    one, three = (paired_difference(x, dict.fromkeys(x, 0.0)) for x in (alone, thrice))
    assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.05)


def test_holm_multiplies_the_smallest_most_and_never_falls():
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": math.nan, "e": 0.9})
    assert found["a"] == pytest.approx(0.04)
    assert found["c"] == pytest.approx(0.09)
    assert found["b"] == pytest.approx(0.09)  # 2 x 0.04 is less than the one before
    assert found["e"] == pytest.approx(0.9) and math.isnan(found["d"])
    assert list(found) == ["a", "b", "c", "d", "e"]
