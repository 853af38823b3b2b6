"""T3: programs."""

from tasks.extract import is_python
from tasks.general import convert_alpaca, judge_general
from tasks.source import Source
from tasks.task import Task


def judge_code(row: dict, reply: str) -> dict[str, float]:
    """The syntax counts only where the reference is Python itself."""
    scores = judge_general(row, reply)
    return {"syntax": is_python(reply), **scores} if is_python(row["output"]) else scores


TASK = Task(
    "T3_code",
    judge_code,
    primary="rouge_l",
    sources={"": [Source("sahil2801/CodeAlpaca-20k", convert_alpaca, license="cc-by-nc-4.0")]},
    overlaps="T1_general",
)
