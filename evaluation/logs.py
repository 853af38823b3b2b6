"""What a run has written, as it is read again: others may have written to it too."""

from collections.abc import Callable
from pathlib import Path

from configs.command_line import UserError
from models.reading import MIB, check_file, parse_json, read_json

MOST_BYTES = 1024 * MIB
# Beyond it no loss, score or time means anything, and a picture has no axis for it.
LARGEST = 1e30
# Of a summary, over all stages: numbers, or null where there is nothing to count.
METRICS = (
    "average_final_loss",
    "average_incremental_loss",
    "learning_loss",
    "forgetting",
    "backward_transfer",
    "retention",
)
# A kind is the question whether a value is of it; its name, in words, is what an error says.
Kind = Callable[[object], bool]


def number(value) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and abs(value) <= LARGEST


def count(value) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def number_from_1(value) -> bool:
    return count(value) and value > 0


def text(value) -> bool:
    return isinstance(value, str)


def number_or_none(value) -> bool:
    return value is None or number(value)


def read_log(
    path: Path, kinds: dict[str, Kind], command: str, optional: tuple[str, ...] = ()
) -> list[dict]:
    """Rows of a JSON-lines log, whose values at the keys of `kinds` are of these kinds.

    Those that are `optional` may be missing. Raises `UserError` where the log is missing, empty or
    damaged; `command` is what writes it.
    """
    rows = []
    try:
        if not path.exists():
            raise UserError(f"{path} is missing: run {command} first, or give --log_dir")
        check_file(path, MOST_BYTES)
        with open(path, encoding="utf-8") as file:
            for line_number, line in enumerate(file, 1):
                where = f"{path}, line {line_number}"
                rows.append(check_row(parse_json(line, where), where, kinds, optional))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{error}; remove the line or run {command} again") from None
    if not rows:
        raise UserError(f"{path} is empty: wait for the first line, or run {command} again")
    return rows


def check_row(row, where: str, kinds: dict[str, Kind], optional: tuple[str, ...]) -> dict:
    """`row`, which is an object with such values; else a ValueError that names the first fault."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no object")
    for key, kind in kinds.items():
        if key not in row and key not in optional:
            raise ValueError(f"{where}: {key!r} is missing; is it this log?")
        if key in row and not kind(row[key]):
            raise ValueError(f"{where}: {key!r} is no {kind.__name__.replace('_', ' ')}")
    return row


def read_summary(path: Path) -> dict:
    """The summary of a finished sequence; `UserError` where it is none.

    What is checked: tasks, the matrix of base and stages, the settings and each stage's seconds.
    """
    if not path.exists():
        raise UserError(f"{path} is missing: is the run of that folder finished?")
    try:
        summary = read_json(path, 64 * MIB)
        if problem := _summary_problem(summary):
            raise ValueError(f"{path} is no summary of a run ({problem})")
    except ValueError as error:
        raise UserError(f"{error}; run python train_slsd_seq.py again") from None
    return summary


def _summary_problem(summary) -> str:
    """What keeps `summary` from being one; "" where nothing does."""
    if not isinstance(summary, dict):
        return "no object"
    tasks, matrix, stages, config = (
        summary.get(key) for key in ("tasks", "matrix", "stages", "config")
    )
    accuracy = summary.get("accuracy", {})
    problems = {
        "tasks": not isinstance(tasks, list) or not tasks or not all(map(text, tasks)),
        "stages": not isinstance(stages, dict)
        or not stages
        or not all(map(_is_stage, stages.values())),
        "config": not isinstance(config, dict) or not count(config.get("seed")),
        "accuracy": not isinstance(accuracy, dict),
        "identity": not isinstance(summary.get("identity", {}), dict),
        **{key: not number_or_none(summary.get(key)) for key in METRICS},
    }
    if not any(problems.values()):
        # A row for each task, though a joint run has one stage.
        shape = len(tasks) + 1, len(tasks)
        of_accuracy = accuracy.get("matrix")
        problems["matrix"] = not _is_matrix(matrix, *shape) or (
            None in matrix[0] and not config.get("light_evaluation")
        )
        problems["accuracy"] = of_accuracy is not None and not _is_matrix(of_accuracy, *shape)
    return ", ".join(name for name, is_wrong in problems.items() if is_wrong)


def _is_stage(stage) -> bool:
    """Numbers, and {"forward", "backward"} of samples a step."""
    if not isinstance(stage, dict) or "train_seconds" not in stage:
        return False
    a_step = stage.get("samples_a_step", {})
    others = [value for key, value in stage.items() if key != "samples_a_step"]
    return isinstance(a_step, dict) and all(map(number, [*others, *a_step.values()]))


def _is_matrix(value, rows: int, columns: int) -> bool:
    """Of numbers, null where there is none."""
    return (
        isinstance(value, list)
        and len(value) == rows
        and all(isinstance(row, list) and len(row) == columns for row in value)
        and all(number_or_none(cell) for row in value for cell in row)
    )
