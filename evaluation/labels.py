"""Where names stand beside crowded points, so that none hides another name or a point."""

import itertools
import math

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, bottom, right, top

ANGLES = [2 * math.pi * i / 24 for i in range(24)]
DISTANCES = (7, 14, 24, 38, 56, 80, 110, 150, 200)
# Free space around a name and around the middle of a point.
MARGIN, POINT = 2, 7
# What an overlap costs, against a pixel of distance.
HIDDEN, CROSSED = 500, 60
ROUNDS = 3


def place(points: list[Point], sizes: list[Point], bounds: Box, taken=(), thin=()) -> list[Box]:
    """A box of each size near its point, in pixels; greedy, then revised while others stay.

    Args:
        points: to be named; all of them are kept clear.
        bounds: the boxes stay inside, where they fit at all.
        taken: boxes that are kept clear too.
        thin: those of lines, which a name had better not stand on.
    """
    boxes: dict[int, Box] = {}
    # The most crowded first: they have the fewest places.
    order = sorted(
        range(len(points)), key=lambda i: sum(math.dist(points[i], other) for other in points)
    )
    for i in order * ROUNDS:
        others = [(points[j], box) for j, box in boxes.items() if j != i]
        costs = (
            (
                _cost(box, points[i], points, others, taken)
                + CROSSED * sum(overlap(box, line) for line in thin)
                + distance,
                box,
            )
            for distance, box in _candidates(points[i], sizes[i], bounds)
        )
        middle = _around(points[i], sizes[i], (0, 0))
        boxes[i] = min(costs, default=(0, middle))[1]
    return [boxes[i] for i in range(len(points))]


def nearest(box: Box, point: Point) -> Point:
    """The place in `box` that is nearest to `point`."""
    left, bottom, right, top = box
    return min(max(point[0], left), right), min(max(point[1], bottom), top)


def overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _around(point: Point, size: Point, away: Point) -> Box:
    x, y = point[0] + away[0], point[1] + away[1]
    return x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2


def _candidates(point: Point, size: Point, bounds: Box):
    """Yields (distance, box) on circles around the point."""
    for distance, angle in itertools.product(DISTANCES, ANGLES):
        x = math.cos(angle) * (distance + size[0] / 2)
        box = _around(point, size, (x, math.sin(angle) * (distance + size[1] / 2)))
        inside = bounds[0] <= box[0] and bounds[1] <= box[1]
        if inside and box[2] <= bounds[2] and box[3] <= bounds[3]:
            yield distance, box


def _cost(box: Box, point: Point, points: list[Point], others, taken) -> float:
    """Of a name in `box`: what it hides, and what the line to its point crosses."""
    wide = (box[0] - MARGIN, box[1] - MARGIN, box[2] + MARGIN, box[3] + MARGIN)
    clear = [*taken, *(other for _, other in others)]
    cost = HIDDEN * sum(overlap(wide, other) for other in clear)
    cost += HIDDEN * sum(math.dist(nearest(box, p), p) < POINT - 1 for p in points)
    line = _along(point, nearest(box, point))
    for p in points:
        cost += CROSSED * (p != point and any(math.dist(p, at) < POINT for at in line))
    cost += HIDDEN * sum(any(nearest(other, at) == at for at in line) for other in clear)
    # Lines to other names that pass under this one.
    for other_point, other in others:
        passing = _along(other_point, nearest(other, other_point))
        cost += HIDDEN * any(nearest(wide, at) == at for at in passing)
    return cost


def _along(start: Point, end: Point) -> list[Point]:
    """Places on the way, a few pixels from one another."""
    steps = max(1, int(math.dist(start, end) // 4))
    return [
        (start[0] + (end[0] - start[0]) * i / steps, start[1] + (end[1] - start[1]) * i / steps)
        for i in range(steps + 1)
    ]
