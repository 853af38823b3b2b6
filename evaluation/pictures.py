"""What every picture needs, and the picture that compares finished runs."""

import itertools
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from evaluation.compare import (
    FinishedRun,
    compare_tables,
    deviation,
    group_runs,
    known,
    mean,
    readings_in,
    with_readings,
)
from evaluation.matrix import short_names

# Okabe & Ito's palette: told apart with every kind of colour vision. Markers tell them apart too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
UNIT = "loss (nats per response token)"


def save(figure, path: Path) -> Path:
    """Writes the picture and returns its path."""
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def style_of(i: int) -> dict:
    """Colour and marker of the i-th group; no pair comes twice among 49."""
    turn = i + i // len(COLOURS)
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[turn % len(MARKERS)]}


def draw_trade_off(axes, groups: dict[str, list[FinishedRun]]) -> None:
    """Learning against forgetting; a method without a sequence is a line."""
    for i, (name, runs) in enumerate(groups.items()):
        x = [run.metric("learning_loss") for run in runs]
        y = [run.metric("forgetting") for run in runs]
        style = style_of(i)
        if math.isnan(mean(y)):
            axes.axvline(mean(x), color=style["color"], linestyle="--", label=f"{name} (no order)")
            continue
        errors = [deviation(v) for v in (x, y)]
        axes.errorbar(
            mean(x),
            mean(y),
            *errors[::-1],
            label=name,
            ls="",
            ms=8,
            capsize=3,
            elinewidth=1,
            **style,
        )
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(
        title="learning against forgetting (lower left is better)",
        xlabel="loss when just learned (nats per response token)",
        ylabel="forgetting (nats per response token)",
    )
    axes.grid(alpha=0.3)


def draw_readings(axes, groups: dict[str, list[FinishedRun]]) -> None:
    """Final loss by reading, a line for each group that has several."""
    several = with_readings(groups)
    if not several:
        axes.axis("off")
        return
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
    axes.set_title(name, fontsize="medium")
    axes.set_xticks(range(len(tasks)), tasks, fontsize="small")
    axes.set_yticks(range(len(tasks)), tasks, fontsize="small")
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


MATRICES_IN_A_ROW = 6


def plot_compare(folders: list[Path], log_dir: Path) -> Path:
    """Prints and writes the tables, and draws the figure as PNG and PDF."""
    groups = group_runs(folders)
    tables = compare_tables(groups)
    print(tables)
    log_dir.mkdir(parents=True, exist_ok=True)
    (log_dir / "compare.md").write_text(tables, encoding="utf-8")

    ordered = {
        n: runs for n, runs in groups.items() if not math.isnan(runs[0].metric("forgetting"))
    }
    rows = -(-len(ordered) // MATRICES_IN_A_ROW)
    figure = plt.figure(figsize=(14, 5 + 2.5 * rows), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(5, max(2.5 * rows, 0.1)))
    trade_off, readings = top.subplots(1, 2)
    draw_trade_off(trade_off, groups)
    top.legend(*trade_off.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    draw_readings(readings, groups)
    if ordered:
        cells = [abs(v) for runs in ordered.values() for row in forgotten(runs) for v in row]
        largest = max(known(cells), default=0) or 1
        columns = min(len(ordered), MATRICES_IN_A_ROW)
        grid = bottom.subplots(rows, columns, squeeze=False).flatten()
        for axes, (name, runs) in zip(grid, ordered.items(), strict=False):
            image = draw_forgotten(axes, runs, name, largest)
        for axes in grid[len(ordered) :]:
            axes.axis("off")
        for axes in grid[::columns]:
            axes.set_ylabel("stage")
        bottom.suptitle("change of each task's loss since it was learned (red: forgotten)")
        bottom.colorbar(image, ax=list(grid), shrink=0.8, label="nats per token")
    figure.savefig(log_dir / "compare.pdf")
    return save(figure, log_dir / "compare.png")
