"""Names beside crowded points, and the picture that compares runs."""

import itertools
import math
import random

from helpers import write_run

import plot_loss
from evaluation import pictures
from evaluation.labels import overlap, place

NAN = math.nan


def test_names_do_not_hide_one_another_nor_a_point():
    """A dozen points on one heap and some apart, names of different lengths."""
    rng = random.Random(3)
    points = [(300 + rng.gauss(0, 25), 60 + rng.gauss(0, 10)) for _ in range(12)]
    points += [(rng.uniform(20, 580), rng.uniform(100, 380)) for _ in range(5)]
    sizes = [(rng.uniform(20, 150), 12) for _ in points]
    taken = [(40, 200, 52, 400)]
    boxes = place(points, sizes, (0, 0, 600, 400), taken)
    assert not [pair for pair in itertools.combinations([*boxes, *taken], 2) if overlap(*pair)]
    for box, size in zip(boxes, sizes, strict=True):
        assert math.isclose(box[2] - box[0], size[0]) and 0 <= box[0] and box[3] <= 400
        assert not [p for p in points if box[0] < p[0] < box[2] and box[1] < p[1] < box[3]]


def test_a_name_that_fits_nowhere_stands_on_its_point():
    assert place([(5, 5)], [(50, 10)], (0, 0, 20, 20)) == [(-20, 0, 30, 10)]


def test_the_trade_off_names_its_points_and_those_that_are_routed(tmp_path, monkeypatch):
    losses = [[5.0, 5.0], [2.0, NAN], [2.5, 1.0]]
    joint = [[5.0, 5.0], [NAN, NAN], [2.0, 2.0]]
    runs = [
        write_run(tmp_path / "ds", losses, (), {"routed": 2.1}),
        write_run(tmp_path / "seq@BA", losses, tasks=["B", "A"]),
        write_run(tmp_path / "seq", losses),
        write_run(tmp_path / "store", losses, (), {"routed": 2.2}, is_one_model=False),
        write_run(tmp_path / "all", joint),
    ]
    drawn = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: drawn.append(figure) or path)
    assert plot_loss.main(["compare", *runs, "--log_dir", str(tmp_path)]) == 0
    axes = drawn[0].axes[0]
    texts = {text.get_text(): text for text in axes.texts}
    # Runs of all orders of a method are one point.
    assert set(texts) == {"ds", "ds, routed", "seq", "store, routed", "all (no order)"}
    assert axes.get_legend() is None
    # Just learned 2.0; after the last stage 2.5, and 2.1 where it is routed.
    assert math.isclose(texts["ds"].xy[1], 0.5) and math.isclose(texts["ds, routed"].xy[1], 0.1)
    boxes = [tuple(text.get_window_extent().extents) for text in texts.values()]
    assert not [pair for pair in itertools.combinations(boxes, 2) if overlap(*pair)]
