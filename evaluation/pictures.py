"""What every picture needs, and the picture that compares finished runs."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from evaluation.compare import (
    Groups,
    compare_tables,
    deviation,
    over_orders,
    readings_in,
    with_readings,
)
from evaluation.finished import FinishedRun, by_method, group_runs
from evaluation.labels import nearest, place
from evaluation.matrix import known, mean, short_names

# A dollar in a name is a dollar.
matplotlib.rcParams["text.parse_math"] = False
# Okabe & Ito's palette: told apart with every kind of colour vision. Markers tell them apart too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
UNIT = "loss (nats per response token)"
# Pixels from a point to its name that need no line between them.
NEAR = 10


def save(figure, path: Path) -> Path:
    """Writes the picture and returns its path."""
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def style_of(i: int) -> dict:
    """Colour and marker of the i-th group; no pair comes twice among 49."""
    turn = i + i // len(COLOURS)
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[turn % len(MARKERS)]}


@dataclass
class Named:
    """A point with half the widths of its bars and the name beside it; y is NaN for a line."""

    name: str
    x: float
    y: float
    dx: float = 0.0
    dy: float = 0.0


def draw_trade_off(axes, methods: Groups) -> list[Named]:
    """Learning against forgetting; returns the points, for `name_points`.

    Hollow: the same model with its last stage read as "routed". A method without a sequence is a
    line.
    """
    points = []
    for i, (name, runs) in enumerate(methods.items()):
        style, x = style_of(i), [run.metric("learning_loss") for run in runs]
        latest = [run.metric("forgetting") for run in runs]
        routed = [run.routed_forgetting() for run in runs]
        for y, more, called in ((latest, {}, name), (routed, {"mfc": "white"}, f"{name}, routed")):
            if known(y):
                point = Named(called, mean(x), mean(y), deviation(x), deviation(y))
                bars = {"xerr": point.dx, "yerr": point.dy, "ecolor": (style["color"], 0.5)}
                axes.errorbar(
                    point.x, point.y, **bars, ls="", ms=7, elinewidth=0.8, **style, **more
                )
                points.append(point)
        if known(latest) and known(routed):
            axes.plot([mean(x)] * 2, [mean(latest), mean(routed)], ":", color=style["color"], lw=1)
        if not known(latest + routed):
            axes.axvline(mean(x), color=style["color"], ls="--", lw=1)
            points.append(Named(f"{name} (no order)", mean(x), math.nan))
    axes.axhline(0, color="grey", linewidth=0.8)
    hollow = "; hollow: read as routed" if any("routed" in p.name for p in points) else ""
    axes.set(
        title=f"learning against forgetting (lower left is better{hollow})",
        xlabel="loss when just learned (nats per response token)",
        ylabel="forgetting (nats per response token)",
    )
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    return points


def name_points(axes, points: list[Named]) -> None:
    """Writes each name beside its point, or along its line.

    What is drawn later must not move the axes.
    """
    figure = axes.get_figure(root=True)
    figure.draw_without_rendering()
    inside, to_pixels = axes.get_window_extent(), axes.transData.transform
    _, zero = to_pixels((0, 0))
    taken, thin, texts = [], [(inside.x0, zero - 1, inside.x1, zero + 1)], {}
    for i, point in enumerate(points):
        is_line = math.isnan(point.y)
        text = axes.annotate(
            point.name,
            (point.x, 1 if is_line else point.y),
            xytext=(3, -3 if is_line else 0),
            xycoords=("data", "axes fraction") if is_line else "data",
            textcoords="offset points",
            fontsize="small",
            va="top" if is_line else "bottom",
            rotation=90 if is_line else 0,
            annotation_clip=False,
        )
        text.set_in_layout(False)
        if is_line:
            taken.append(tuple(text.get_window_extent().extents))
            x, _ = to_pixels((point.x, 0))
            thin.append((x - 1, inside.y0, x + 1, inside.y1))
            continue
        texts[i] = text
        left, low = to_pixels((point.x - point.dx, point.y - point.dy))
        right, high = to_pixels((point.x + point.dx, point.y + point.dy))
        x, y = to_pixels((point.x, point.y))
        thin += [(left, y - 1, right, y + 1), (x - 1, low, x + 1, high)]
    places = [tuple(to_pixels((points[i].x, points[i].y))) for i in texts]
    sizes = [text.get_window_extent() for text in texts.values()]
    sizes = [(size.width, size.height) for size in sizes]
    boxes = place(places, sizes, tuple(inside.extents), taken, thin)
    for text, start, box in zip(texts.values(), places, boxes, strict=True):
        # In points, which stay where they are in a file of another resolution.
        text.set_position([(box[k] - start[k]) * 72 / figure.dpi for k in (0, 1)])
        end = nearest(box, start)
        if math.dist(end, start) > NEAR:
            ends = axes.transData.inverted().transform([start, end])
            axes.add_line(plt.Line2D(*zip(*ends, strict=True), color="grey", lw=0.6, zorder=1))


def draw_readings(axes, several: Groups) -> None:
    """Final loss by reading, a line for each method."""
    names = readings_in(itertools.chain(*several.values()))
    for j, reading in enumerate(names):
        values = [[run.reading(reading) for run in runs] for runs in several.values()]
        axes.errorbar(
            [mean(of_group) for of_group in values],
            # One above the other, so that none hides another.
            [i + (j / len(names) - 0.5) / 2 for i in range(len(several))],
            xerr=[deviation(v) for v in values],
            label=reading,
            ls="",
            capsize=3,
            elinewidth=1,
            **style_of(j),
        )
    axes.set_yticks(range(len(several)), several)
    axes.set_ylim(len(several) - 0.5, -0.5)
    axes.set(title="after the last stage, by reading", xlabel="mean loss (nats per response token)")
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize="small", ncols=2)


# Of tasks, beside small matrices.
MOST_NAMES = 8


def draw_forgotten(axes, runs: list[FinishedRun], name: str, largest: float):
    """How much worse each task is after each stage than right after its own; mean over seeds."""
    change, tasks = forgotten(runs), short_names(runs[0].summary["tasks"])
    if len(tasks) > MOST_NAMES:
        tasks = list(range(1, len(tasks) + 1))
    image = axes.imshow(change, cmap="RdBu_r", vmin=-largest, vmax=largest)
    for y, row in enumerate(change):
        for x, value in enumerate(row):
            # More numbers could not be read.
            if not math.isnan(value) and len(tasks) <= MOST_NAMES:
                color = "white" if abs(value) > 0.6 * largest else "black"
                # Plus 0: a zero has no sign.
                text = f"{round(value, 2) + 0:+.2f}" if x != y else "0"
                axes.text(x, y, text, ha="center", va="center", fontsize=7, color=color)
    axes.set_title(name if len(name) <= 24 else name.replace(",", ",\n", 1), fontsize="small")
    # Of many numbers every second, so that they do not touch.
    shown = range(0, len(tasks), 1 if len(tasks) <= MOST_NAMES else 2)
    for write in (axes.set_xticks, axes.set_yticks):
        write(shown, [tasks[i] for i in shown], fontsize="small")
    return image


def forgotten(runs: list[FinishedRun]) -> list[list[float]]:
    """A[t][i] - A[i][i] of stages t >= i, mean over `runs`; NaN elsewhere."""
    size = len(runs[0].summary["tasks"])
    matrices = [run.summary["matrix"] for run in runs]
    return [
        [
            mean([m[t + 1][i] - m[i + 1][i] for m in matrices if m[i + 1][i] is not None])
            if i <= t and matrices[0][t + 1][i] is not None
            else math.nan
            for i in range(size)
        ]
        for t in range(size)
    ]


MATRICES_IN_A_ROW, MOST_MATRICES = 6, 12


def draw_matrices(figure, groups: Groups) -> None:
    """What each group forgot, beside one another."""
    rows, columns = -(-len(groups) // MATRICES_IN_A_ROW), min(len(groups), MATRICES_IN_A_ROW)
    cells = [abs(v) for runs in groups.values() for row in forgotten(runs) for v in row]
    largest = max(known(cells), default=0) or 1
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, runs) in zip(grid, groups.items(), strict=False):
        image = draw_forgotten(axes, runs, name, largest)
    for axes in grid[len(groups) :]:
        axes.axis("off")
    for axes in grid[::columns]:
        axes.set_ylabel("stage")
    figure.suptitle("change of each task's loss since it was learned (red: forgotten)")
    figure.colorbar(image, ax=list(grid), shrink=0.8, label="nats per token")


def plot_compare(folders: list[Path], log_dir: Path, reference: str = "") -> Path:
    """Prints and writes the tables, and draws the figure as PNG and PDF."""
    groups = group_runs(folders)
    tables = compare_tables(groups, reference)
    print(tables)
    log_dir.mkdir(parents=True, exist_ok=True)
    (log_dir / "compare.md").write_text(tables, encoding="utf-8")
    figure = draw_compare(groups)
    figure.savefig(log_dir / "compare.pdf")
    return save(figure, log_dir / "compare.png")


def draw_compare(groups: Groups):
    """Learning against forgetting, the readings, and what each method forgot."""
    methods = over_orders(groups)
    # Of several orders the first: their matrices have other columns.
    first = (next(iter(of_method.items())) for of_method in by_method(groups).values())
    ordered = [(n, runs) for n, runs in first if not math.isnan(runs[0].metric("forgetting"))]
    ordered = dict(ordered[:MOST_MATRICES])
    below = 2.5 * -(-len(ordered) // MATRICES_IN_A_ROW)
    figure = plt.figure(figsize=(14, 6 + below), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(6, max(below, 0.1)))
    several = with_readings(methods)
    trade_off, *readings = top.subplots(
        1, 1 + bool(several), squeeze=False, width_ratios=(3, 2)[: 1 + bool(several)]
    )[0]
    points = draw_trade_off(trade_off, methods)
    for axes in readings:
        draw_readings(axes, several)
    if ordered:
        draw_matrices(bottom, ordered)
    name_points(trade_off, points)
    return figure
