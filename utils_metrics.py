"""The stage x task matrix and what is computed from it.

Forgetting after Chaudhry et al. 2018, backward transfer after Lopez-Paz & Ranzato 2017.

A matrix A has T+1 rows and T columns: A[0] is the untouched base, A[t][i] task i after stage t, and
NaN where a task was not evaluated. Rows and columns are in the order of learning.
"""

import math

Matrix = list[list[float]]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def average_final(matrix: Matrix) -> float:
    """Mean of the last row."""
    return _mean(matrix[-1])


def forgetting(matrix: Matrix, lower_is_better: bool = True) -> float:
    """Mean over i < T of how much worse A[T][i] is than its best since task i was learned.

    Positive = forgotten; NaN with one task. For losses worse means larger, for scores smaller.
    """
    sign, last = (1 if lower_is_better else -1), len(matrix) - 1
    return _mean(
        [
            sign * matrix[last][i] - min(sign * matrix[stage][i] for stage in range(i + 1, last))
            for i in range(last - 1)
        ]
    )


def backward_transfer(matrix: Matrix, lower_is_better: bool = True) -> float:
    """BWT: mean over i < T of how much better A[T][i] is than right after task i.

    Negative = forgotten; NaN with one task.
    """
    sign, last = (1 if lower_is_better else -1), len(matrix) - 1
    return _mean([sign * (matrix[i + 1][i] - matrix[last][i]) for i in range(last - 1)])


def loss_matrix(evaluations: list[dict], tasks: list[str]) -> Matrix:
    """The matrix from lines {"stage", "eval_task", "loss"}; stage "base" is row 0."""
    matrix = [[math.nan] * len(tasks) for _ in range(len(tasks) + 1)]
    rows = {"base": 0, **{task: t for t, task in enumerate(tasks, 1)}}
    for line in evaluations:
        matrix[rows[line["stage"]]][tasks.index(line["eval_task"])] = line["loss"]
    return matrix


def summarise(matrix: Matrix) -> dict[str, float]:
    """Average final loss, forgetting and BWT of a matrix of losses."""
    return {
        "average_final_loss": average_final(matrix),
        "forgetting": forgetting(matrix),
        "backward_transfer": backward_transfer(matrix),
    }


def format_matrix(matrix: Matrix, tasks: list[str]) -> str:
    """The matrix of losses and its summary as aligned text, with what each number means."""
    width = max(map(len, tasks)) + 2
    lines = [
        "held-out loss, nats per response token (lower is better)",
        "stage".ljust(width) + "".join(task.rjust(width) for task in tasks),
    ]
    for stage, row in zip(["base", *tasks], matrix, strict=True):
        cells = ("" if math.isnan(loss) else f"{loss:.3f}" for loss in row)
        lines.append(stage.ljust(width) + "".join(cell.rjust(width) for cell in cells))
    summary = summarise(matrix)
    lines.append(f"average final loss {summary['average_final_loss']:.3f} (lower is better)")
    if len(tasks) > 1:
        lines.append(f"forgetting         {summary['forgetting']:+.3f} (positive = forgotten)")
        lines.append(
            f"backward transfer  {summary['backward_transfer']:+.3f} (negative = forgotten)"
        )
    return "\n".join(lines)
