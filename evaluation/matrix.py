"""The stage x task matrix and what is computed from it.

A matrix A has T+1 rows and T columns: A[0] is the untouched base, A[t][i] task i after stage t
(both from 1), and NaN where a task was not evaluated. Rows and columns are in the order of
learning. Below, "better by" is the difference in the good direction: smaller losses, larger scores.
A mean over tasks is taken over those for which all its cells are there, and is NaN without any.
"""

import math
import textwrap
from collections.abc import Iterable

from configs.ending import printable
from methods.method import JOINT
from models.reading import MIB
from tasks.task import Task

Matrix = list[list[float]]


def known(values: Iterable[float]) -> list[float]:
    """Those that are not NaN."""
    return [value for value in values if not math.isnan(value)]


def mean(values: Iterable[float]) -> float:
    """The mean of the known values; NaN without any."""
    numbers = known(values)
    return sum(numbers) / len(numbers) if numbers else math.nan


def _gain(before: float, after: float, lower_is_better: bool) -> float:
    """How much better `after` is than `before`; NaN where either is missing."""
    return before - after if lower_is_better else after - before


def average_final(matrix: Matrix) -> float:
    """Mean of the last row: 1/T sum_i A[T][i]."""
    return mean(matrix[-1])


def average_incremental(matrix: Matrix) -> float:
    """AIA: the mean over the tasks seen so far, averaged over stages (Douillard et al. 2020).

    1/T sum_t (1/t sum_{i <= t} A[t][i]). NaN where a task that is known at the end was not
    evaluated after each stage: a mean over stages means nothing of which some were left out.
    """
    columns = [i for i, value in enumerate(matrix[-1]) if not math.isnan(value)]
    stages = [[row[i] for i in columns if i < t] for t, row in enumerate(matrix) if t]
    return math.nan if any(map(math.isnan, sum(stages, []))) else mean(map(mean, stages))


def learning(matrix: Matrix) -> float:
    """Each task right after its stage: 1/T sum_i A[i][i]."""
    return mean(row[t - 1] for t, row in enumerate(matrix) if t)


def forgetting(matrix: Matrix, lower_is_better: bool = True) -> float:
    """How much worse each task is at the end than at its best (Chaudhry et al. 2018, eq. 3).

    For losses 1/(T-1) sum_{i < T} (A[T][i] - min_{i <= t < T} A[t][i]): positive = forgotten, and
    a gain counts as a gain. NaN with one task.
    """
    last, gains = len(matrix) - 1, []
    for i in range(last - 1):
        after = matrix[last][i]
        losses = [-_gain(matrix[t][i], after, lower_is_better) for t in range(i + 1, last)]
        gains.append(max(known(losses), default=math.nan))
    return mean(gains)


def backward_transfer(matrix: Matrix, lower_is_better: bool = True) -> float:
    """BWT: how much better each task is at the end than right after its stage.

    For scores 1/(T-1) sum_{i < T} (A[T][i] - A[i][i]) (Lopez-Paz & Ranzato 2017, eq. 3). Negative =
    forgotten; NaN with one task.
    """
    last = len(matrix) - 1
    return mean(_gain(matrix[i + 1][i], matrix[last][i], lower_is_better) for i in range(last - 1))


def forward_transfer(matrix: Matrix, lower_is_better: bool = True) -> float:
    """FWT: how much better each task is right before its stage than in the base.

    For scores 1/(T-1) sum_{i > 1} (A[i-1][i] - A[0][i]) (Lopez-Paz & Ranzato 2017, eq. 4). NaN
    where tasks were not evaluated before they were learned.
    """
    tasks = range(1, len(matrix[0]))
    return mean(_gain(matrix[0][i], matrix[i][i], lower_is_better) for i in tasks)


def retention(matrix: Matrix, lower_is_better: bool = True) -> float:
    """The share of what the stages gained over the base that is left at the end.

    For scores sum_{i < T} (A[T][i] - A[0][i]) / sum_{i < T} (A[i][i] - A[0][i]): 1 = all, 0 = back
    at the base, above 1 = improved later on. NaN with one task, or where nothing was gained.
    """
    last = len(matrix) - 1
    pairs = [
        (
            _gain(matrix[0][i], matrix[last][i], lower_is_better),
            _gain(matrix[0][i], matrix[i + 1][i], lower_is_better),
        )
        for i in range(last - 1)
    ]
    whole = [pair for pair in pairs if len(known(pair)) == 2]
    kept, gained = (sum(column) for column in zip(*whole, strict=True)) if whole else (0.0, 0.0)
    return kept / gained if gained > 0 else math.nan


def _matrix(cells: dict[tuple[str, str], float], tasks: list[str]) -> Matrix:
    """From (stage, task) -> number: "base" is row 0, JOINT, which learns all, the last one."""
    matrix = [[math.nan] * len(tasks) for _ in range(len(tasks) + 1)]
    rows = {"base": 0, JOINT: -1, **{task: t for t, task in enumerate(tasks, 1)}}
    for (stage, task), value in cells.items():
        matrix[rows[stage]][tasks.index(task)] = value
    return matrix


def loss_matrix(evaluations: list[dict], tasks: list[str]) -> Matrix:
    """The matrix from lines {"stage", "eval_task", "loss"} of the reading "latest"."""
    latest = [line for line in evaluations if line.get("branches", "latest") == "latest"]
    return _matrix({(line["stage"], line["eval_task"]): line["loss"] for line in latest}, tasks)


def score_matrix(scores: list[dict], metrics: dict[str, str]) -> Matrix:
    """The matrix of the reading "latest" from lines {"stage", "task", "metric", "score"}.

    `metrics`: that of each task.
    """
    wanted = [
        line
        for line in scores
        if metrics.get(line["task"]) == line["metric"]
        and line.get("branches", "latest") == "latest"
    ]
    return _matrix({(line["stage"], line["task"]): line["score"] for line in wanted}, list(metrics))


def primary_metrics(scores: list[dict], tasks: dict[str, Task]) -> dict[str, str]:
    """The score that tells most of each task, or the first one where it was never given."""
    found = {task: [line["metric"] for line in scores if line["task"] == task] for task in tasks}
    return {
        name: task.primary if task.primary in found[name] else next(iter(found[name]), task.primary)
        for name, task in tasks.items()
    }


def summarise_scores(matrix: Matrix, joint: bool = False) -> dict[str, float]:
    """Last, Avg (AIA), BWT, FWT and more of a matrix of scores, as papers report them."""
    final = average_final(matrix)
    found = {
        "avg": average_incremental(matrix),
        "learning": learning(matrix),
        "bwt": backward_transfer(matrix, lower_is_better=False),
        "fwt": forward_transfer(matrix, lower_is_better=False),
        "forgetting": forgetting(matrix, lower_is_better=False),
    }
    if joint:
        found = dict.fromkeys(found, math.nan) | {"learning": final}
    return {"last": final, **found}


def summarise(matrix: Matrix, joint: bool = False) -> dict[str, float]:
    """Every metric of a matrix of losses; `joint`: all tasks were learned in the last stage."""
    sequence = {
        "average_incremental_loss": average_incremental,
        "learning_loss": learning,
        "forgetting": forgetting,
        "backward_transfer": backward_transfer,
        "forward_transfer": forward_transfer,
        "retention": retention,
    }
    final = average_final(matrix)
    if joint:
        found = dict.fromkeys(sequence, math.nan) | {"learning_loss": final}
    else:
        found = {name: metric(matrix) for name, metric in sequence.items()}
    return {"average_final_loss": final, **found}


# Columns of a terminal that a table may take; a wider one has numbers for its tasks.
WIDEST = 120


def _table(title: str, rows: dict[str, list[float]], tasks: list[str], form=".3f") -> list[str]:
    first, width = max(map(len, [title, *rows])), max(map(len, tasks)) + 2
    lines, columns = [], tasks
    if first + width * len(tasks) > WIDEST:
        columns, width = [str(number) for number in range(1, len(tasks) + 1)], 7
        legend = ", ".join(f"{number} {task}" for number, task in zip(columns, tasks, strict=True))
        lines += textwrap.wrap(f"columns: {legend}", WIDEST)
    lines.append(title.ljust(first) + "".join(column.rjust(width) for column in columns))
    for name, row in rows.items():
        cells = ("" if math.isnan(number) else format(number, form) for number in row)
        lines.append((name.ljust(first) + "".join(cell.rjust(width) for cell in cells)).rstrip())
    return lines


def short_names(tasks: list[str]) -> list[str]:
    """Without what follows the first _, where all stay apart without it."""
    short = [task.partition("_")[0] for task in tasks]
    return short if len(set(short)) == len(tasks) and all(short) else list(tasks)


def _stages(matrix: Matrix, tasks: list[str], joint: bool) -> dict[str, list[float]]:
    stages = {JOINT: matrix[-1]} if joint else dict(zip(tasks, matrix[1:], strict=True))
    return {"base": matrix[0], **stages}


# (what it is called, its key, its form, what it means)
LOSS_SUMMARY = (
    ("average final loss", "average_final_loss", ".3f", "lower is better"),
    ("just-learned loss", "learning_loss", ".3f", "lower is better"),
    ("forgetting", "forgetting", "+.3f", "positive = forgotten"),
    ("backward transfer", "backward_transfer", "+.3f", "negative = forgotten"),
    ("retention", "retention", ".0%", "of what was gained over the base"),
)
SCORE_SUMMARY = (
    ("Last", "last", ".1f", "mean after the last stage"),
    ("Avg (AIA)", "avg", ".1f", "mean over the tasks seen, over the stages"),
    ("just learned", "learning", ".1f", "mean of each task right after its stage"),
    ("forgetting", "forgetting", "+.1f", "positive = forgotten"),
    ("backward transfer", "bwt", "+.1f", "negative = forgotten"),
    ("forward transfer", "fwt", "+.1f", "before a task was learned, against the base"),
)


def _told(summary: dict[str, float], rows: tuple) -> list[str]:
    """A line for each number of a summary that there is."""
    return [
        f"{name.ljust(18)} {summary[key]:{form}} ({meaning})"
        for name, key, form, meaning in rows
        if not math.isnan(summary[key])
    ]


def format_matrix(matrix: Matrix, tasks: list[str], joint: bool = False) -> str:
    """The matrix of losses and its summary as aligned text, with what each number means."""
    lines = ["held-out loss, nats per response token (lower is better)"]
    lines += _table("stage", _stages(matrix, tasks, joint), tasks)
    return "\n".join(lines + _told(summarise(matrix, joint), LOSS_SUMMARY))


def format_score_matrix(matrix: Matrix, metrics: dict[str, str], joint: bool = False) -> str:
    """The matrix of scores and its summary as aligned text, with what each number means."""
    tasks = list(metrics)
    kinds = set(metrics.values())
    names = short_names(tasks)
    if len(kinds) > 1:
        names = [f"{name} {m}" for name, m in zip(names, metrics.values(), strict=True)]
    which = f": {kinds.pop()}" if len(kinds) == 1 else ""
    lines = [f"score from 0 to 100 (higher is better){which}"]
    lines += _table("stage", _stages(matrix, tasks, joint), names, ".1f")
    return "\n".join(lines + _told(summarise_scores(matrix, joint), SCORE_SUMMARY))


def format_readings(evaluations: list[dict], tasks: list[str], meanings: dict[str, str]) -> str:
    """The last stage's losses by reading, as aligned text; `meanings` explains each reading."""
    last = [line for line in evaluations if line["stage"] == evaluations[-1]["stage"]]
    loss = {(line["branches"], line["eval_task"]): line["loss"] for line in last}
    readings = dict.fromkeys(reading for reading, _ in loss)
    rows = {
        f"{name}: {meanings[name]}": [loss.get((name, task), math.nan) for task in tasks]
        for name in readings
    }
    return "\n".join(["", *_table("after the last stage, read as", rows, tasks)])


def format_costs(stages: dict[str, dict]) -> str:
    """What a method kept after each stage and read at its steps, as aligned text.

    From stage -> {"samples_kept", "bytes_kept", "samples_a_step": {"backward", "forward"}}.
    """
    rows = {}
    for name, stage in stages.items():
        read = stage.get("samples_a_step", {})
        found = (stage.get("samples_kept"), stage.get("bytes_kept", math.nan) / MIB)
        found += (read.get("backward"), read.get("forward"))
        rows[name] = [math.nan if number is None else number for number in found]
    columns = ["samples kept", "MiB kept", "backward a step", "forward a step"]
    lines = ["", "kept for later tasks, and samples read a step (forward: without a backward)"]
    return "\n".join([*lines, *_table("stage", rows, columns, ",.1f")])


def with_interval(line: dict) -> str:
    """Of a line of the scores the score and its 95 % interval."""
    return f"{line['score']:.1f} [{line['low']:.1f}, {line['high']:.1f}]"


def format_scores(scores: list[dict]) -> str:
    """Scores by task, metric and reading as aligned text.

    From lines {"task", "metric", "branches", "score", "low", "high", "n", "left_out"}.
    """
    if not scores:
        return "no score applies to any of the answers"
    readings = list(dict.fromkeys(line["branches"] for line in scores))
    cells = {
        (line["task"], line["metric"], line["branches"]): (with_interval(line)) for line in scores
    }
    names = {}
    for line in scores:
        # Lines of older runs do not tell.
        out = f", {line['left_out']} left out" if line.get("left_out") else ""
        told = f"{line['task']} {line['metric']} ({line['n']}{out})"
        names[line["task"], line["metric"]] = told
    first = max(map(len, names.values()))
    width = max(map(len, [*cells.values(), *readings])) + 2
    lines = ["score from 0 to 100, higher is better, with its 95 % interval"]
    lines.append("task metric (answers)".ljust(first) + "".join(r.rjust(width) for r in readings))
    for (task, metric), told in names.items():
        row = (cells.get((task, metric, reading), "") for reading in readings)
        lines.append(told.ljust(first) + "".join(cell.rjust(width) for cell in row))
    return "\n".join(lines)


def format_samples(samples: list[dict], references: dict[str, list[str]], width: int = 100) -> str:
    """Answers to the same question one below the other, stage by stage, cut to `width` characters.

    From lines {"stage", "task", "number", "reply"} and the references by task.
    """

    def one_line(text: str) -> str:
        text = " ".join(printable(text).split())
        return text if len(text) <= width else text[: width - 3] + "..."

    lines = ["answers after each stage"]
    first = max(len("reference"), *(len(s["stage"]) for s in samples))
    for task, number in dict.fromkeys((s["task"], s["number"]) for s in samples):
        reference = one_line(references[task][number])
        lines += ["", f"{task}, question {number + 1}", f"{'reference'.ljust(first)}  {reference}"]
        for s in samples:
            if (s["task"], s["number"]) == (task, number):
                lines.append(f"{s['stage'].ljust(first)}  {one_line(s['reply'])}")
    return "\n".join(lines)
