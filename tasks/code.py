"""T3: programs."""

from tasks.general import convert_alpaca
from tasks.scores import is_python, rouge_l
from tasks.source import Source
from tasks.task import Task


def judge_code(row: dict, reply: str) -> dict[str, float]:
    """The syntax counts only where the reference is Python itself."""
    scores = {"rouge_l": rouge_l(reply, row["output"])}
    return {"syntax": is_python(reply), **scores} if is_python(row["output"]) else scores


TASK = Task(
    "T3_code",
    judge_code,
    primary="rouge_l",
    sources={"": [Source("sahil2801/CodeAlpaca-20k", convert_alpaca)]},
    overlaps="T1_general",
)
