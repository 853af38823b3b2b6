"""Draws the loss curves of a run from its logs, or compares runs.

python plot_loss.py single TASK          logs/single_TASK_train_loss.png
python plot_loss.py seq                  logs/seq_eval_loss.png
python plot_loss.py compare RUN [RUN ..] logs/compare.md, .png and .pdf; RUN: log folder of a run
python plot_loss.py report [RUN ..]      logs/report.html: all of that and more in one file
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path

from configs.command_line import Parser, UserError
from configs.ending import command_line
from evaluation.compare import compare_tables
from evaluation.finished import group_runs
from evaluation.logs import count, number, number_from_1, read_log, text
from evaluation.page import from_markdown, picture, write_page
from evaluation.pictures import COLOURS, UNIT, draw_compare, plot_compare, plt, save, style_of

LINES_WITH_MARKERS = 30
# With more of them a picture has colours alone: their names and numbers could not be read.
MOST_TASKS = 40


def running_mean(values: list[float], width: int) -> list[float]:
    """Mean of each value and the `width` - 1 before it, as far as there are so many."""
    sums = list(itertools.accumulate(values, initial=0.0))
    starts = [max(0, end - width) for end in range(1, len(sums))]
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, 1)]


def ends_of_epochs(train: list[dict]) -> Callable[[int], int]:
    """The step at which an epoch, from 1, ended, as far as the training log tells.

    A line (epoch, step) says that epoch - 1 epochs have fewer steps than step, and epoch epochs no
    fewer. The last line of a finished run is its last step, which ends an epoch unless
    --max_steps_per_task came before.
    """
    last = train[-1]
    least = max(-(-row["step"] // row["epoch"]) for row in train)
    later = [row for row in train if row["epoch"] > 1]
    most = min(((row["step"] - 1) // (row["epoch"] - 1) for row in later), default=last["step"])
    whole, rest = divmod(last["step"], last["epoch"])
    steps = whole if not rest and least <= whole <= most else (least + max(least, most)) // 2

    def end(epoch: int) -> int:
        return min(epoch * steps, last["step"]) if epoch == last["epoch"] else epoch * steps

    return end


def plot_single(log_dir: Path, task: str) -> Path:
    """Training loss over optimizer steps and held-out loss at the end of each epoch."""
    command = f"python train_single_task.py --task {task}"
    log = log_dir / f"single_{task}_train_loss.jsonl"
    kinds = {"epoch": number_from_1, "loss": number}
    train = read_log(log, {"step": count, **kinds}, command)
    held_out = read_log(log_dir / f"single_{task}_eval_loss.jsonl", kinds, command)
    steps, losses = [row["step"] for row in train], [row["loss"] for row in train]

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    width = max(1, len(steps) // 20)
    # A few lines are points; a single one would else be nothing.
    marker = "." if len(steps) <= LINES_WITH_MARKERS else ""
    alpha = 0.3 if width > 1 else 1
    axes.plot(steps, losses, color=COLOURS[0], marker=marker, alpha=alpha, label="training")
    if width > 1:
        smooth = running_mean(losses, width)
        axes.plot(steps, smooth, color=COLOURS[0], label=f"training, mean of {width} log lines")
    end_of = ends_of_epochs(train)
    axes.plot(
        [end_of(row["epoch"]) for row in held_out],
        [row["loss"] for row in held_out],
        color=COLOURS[4],
        marker="o",
        linestyle="--",
        label="held-out, end of epoch",
    )
    # A log does not say what was trained.
    axes.set(title=f"{task}: loss", xlabel="optimizer step", ylabel=UNIT)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    return save(figure, log.with_suffix(".png"))


def brief(name: str) -> str:
    """A name that has room beside an axis."""
    return name if len(name) <= 18 else name[:16] + "…"


def write_names(set_ticks: Callable, names: list[str], **style) -> None:
    """Names along an axis; of very many every second, third, ...: more cannot be read."""
    every = 1 + len(names) // (2 * MOST_TASKS)
    set_ticks(range(0, len(names), every), map(brief, names[::every]), **style)


def turned(names: list[str]) -> dict:
    """How so many names are written below an axis: the few of them level."""
    return {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if len(names) > 6 else {}


def plot_sequence(log_dir: Path) -> Path:
    """Held-out loss of every task over the stages, as lines and as the stage x task matrix."""
    log = log_dir / "seq_eval_loss.jsonl"
    return save(draw_sequence(log), log.with_suffix(".png"))


def draw_sequence(log: Path):
    command = "python train_slsd_seq.py"
    kinds = {"stage": text, "eval_task": text, "loss": number, "branches": text}
    rows = read_log(log, kinds, command, optional=("branches",))
    rows = [row for row in rows if row.get("branches", "latest") == "latest"]
    if not rows:
        raise UserError(f"{log} holds no loss of the model as it is: run {command} again")
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    # In the order of learning: the base is evaluated on all tasks in this order.
    tasks = list(dict.fromkeys(row["eval_task"] for row in rows))
    loss = {(row["stage"], row["eval_task"]): row["loss"] for row in rows}

    # Room for the numbers of many tasks; the specified five have what they always had.
    more = min(max(0, len(tasks) - 6), MOST_TASKS)
    figure, (lines, heat) = plt.subplots(
        1,
        2,
        figsize=(13 + more, 5 + 0.4 * more),
        layout="constrained",
        width_ratios=(1.1, 1 + 0.05 * more),
    )
    for i, task in enumerate(tasks):
        seen = [stage for stage in stages if (stage, task) in loss]
        places = [stages.index(stage) for stage in seen]
        values = [loss[stage, task] for stage in seen]
        style = style_of(i)
        # All at once: "joint" has learned every task.
        learned = seen.index(task) if task in seen else min(1, len(seen) - 1)
        # Dotted from the untouched base, where it was evaluated, to the stage that learns the task.
        lines.plot(places[: learned + 1], values[: learned + 1], ":", mfc="white", **style)
        lines.plot(places[learned:], values[learned:], linewidth=2, label=brief(task), **style)
    hollow = " (hollow: untouched base)" if "base" in stages else ""
    lines.set(
        title="held-out loss of each task" + hollow,
        xlabel="stage (the task just learned)",
        ylabel=UNIT,
    )
    write_names(lines.set_xticks, stages, **turned(stages))
    lines.grid(alpha=0.3)
    # Below the axes: inside them it would hide lines.
    below = -0.13 if not turned(stages) else -0.3
    if len(tasks) <= MOST_TASKS:
        lines.legend(loc="upper center", bbox_to_anchor=(0.5, below), ncols=5, columnspacing=1)
    draw_matrix(figure, heat, stages, tasks, loss)
    return figure


def draw_training(log: Path):
    """Training loss over the steps of all stages, one colour a stage."""
    kinds = {"stage": text, "step": count, "loss": number}
    rows = read_log(log, kinds, "python train_slsd_seq.py")
    figure, axes = plt.subplots(figsize=(13, 3.5), layout="constrained")
    begin = 0
    for i, stage in enumerate(dict.fromkeys(row["stage"] for row in rows)):
        of_stage = [row for row in rows if row["stage"] == stage]
        steps = [begin + row["step"] for row in of_stage]
        color = COLOURS[i % len(COLOURS)]
        axes.plot(steps, [row["loss"] for row in of_stage], ".-", color=color, label=brief(stage))
        begin = steps[-1]
    axes.set(title="training loss", xlabel="optimizer step, over all stages", ylabel=UNIT)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    return figure


def write_report(folders: list[Path], log_dir: Path, reference: str) -> Path:
    """The page of finished runs; where there are several, with what compares them."""
    groups = group_runs(folders)
    compared = ""
    if len(folders) > 1:
        compared = from_markdown(compare_tables(groups, reference))
        compared += picture(draw_compare(groups), "runs compared")
    runs = {}
    for name, of_group in groups.items():
        for run in of_group:
            drawn = {
                "training": draw_training(run.folder / "seq_train_loss.jsonl"),
                "held-out": draw_sequence(run.folder / "seq_eval_loss.jsonl"),
            }
            seed = run.summary["config"]["seed"]
            pictures = [picture(figure, f"{title} loss") for title, figure in drawn.items()]
            runs[f"{name}, seed {seed}"] = run, pictures
            plt.close("all")
    path = log_dir / "report.html"
    write_page(path, runs, compared)
    return path


def draw_matrix(figure, axes, stages: list[str], tasks: list[str], loss: dict) -> None:
    """The losses as numbers, on colours for the change against each task's first loss."""
    first = {task: next(loss[s, task] for s in stages if (s, task) in loss) for task in tasks}
    change = [
        [loss[stage, task] - first[task] if (stage, task) in loss else math.nan for task in tasks]
        for stage in stages
    ]
    largest = max((abs(c) for row in change for c in row if not math.isnan(c)), default=0) or 1
    image = axes.imshow(change, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    for y, stage in enumerate(stages):
        for x, task in enumerate(tasks):
            if (stage, task) in loss and len(tasks) <= MOST_TASKS:
                dark = abs(change[y][x]) > 0.6 * largest
                axes.text(
                    x,
                    y,
                    f"{loss[stage, task]:{'.3f' if len(tasks) <= 8 else '.2f'}}",
                    fontsize="medium" if len(tasks) <= 8 else "small",
                    ha="center",
                    va="center",
                    color="white" if dark else "black",
                    # The stage that learned the task.
                    weight="bold" if stage == task else "normal",
                )
    axes.set(
        title="stage x task matrix (bold: just learned)", xlabel="evaluated on", ylabel="stage"
    )
    write_names(axes.set_xticks, tasks, **turned(tasks))
    write_names(axes.set_yticks, stages)
    against = "against the base" if "base" in stages else "since it was learned"
    figure.colorbar(image, ax=axes, label=f"change {against} (blue: better), nats per token")


@command_line
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("single", "seq", "compare", "report"), help="what to draw")
    parser.add_argument("names", nargs="*", help="the task of a single run; the runs to compare")
    parser.add_argument("--log_dir", type=Path, default=Path("logs"), help="folder of the logs")
    parser.add_argument(
        "--against",
        default="",
        metavar="METHOD",
        help="of the runs to compare, the one that all others are paired with by order and seed",
    )
    args = parser.parse_args(argv)
    fits = {"single": len(args.names) == 1, "seq": not args.names}
    fits |= {"compare": bool(args.names), "report": True}
    if not fits[args.what]:
        raise UserError(
            "give one task with single, such as single TASK, none with seq, and the log folders of "
            "runs with compare or report"
        )
    if args.against and args.what not in ("compare", "report"):
        raise UserError(f"--against {args.against} belongs to compare and report: leave it out")
    if args.what == "single":
        path = plot_single(args.log_dir, args.names[0])
    elif args.what == "seq":
        path = plot_sequence(args.log_dir)
    elif args.what == "report":
        folders = [Path(name) for name in args.names] or [args.log_dir]
        path = write_report(folders, args.log_dir, args.against)
    else:
        path = plot_compare([Path(name) for name in args.names], args.log_dir, args.against)
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
