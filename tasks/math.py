"""T2: grade-school mathematics."""

import re

from tasks.scores import flexible_number, same_number, strict_number
from tasks.source import Sample, Source, WrongShape, texts
from tasks.task import Task


def convert_gsm8k(row: dict) -> Sample:
    """openai/gsm8k: the calculator's <<48/2=24>> notes go, the last line "#### 24" stays.

    No input: a constant one would tell a router the task.
    """
    question, answer = texts(row, "question", "answer")
    answer = re.sub(r"<<[^<>]*>>", "", answer)
    if not re.search(r"(?m)^#### \S+\s*\Z", answer):
        raise WrongShape("no final #### answer")
    return Sample(question, "", answer)


def judge_math(row: dict, reply: str) -> dict[str, float]:
    """Strict looks behind the last ####, flexible takes the last number: they part by format."""
    answer = strict_number(row["output"])
    return {
        "strict": same_number(strict_number(reply), answer),
        "flexible": same_number(flexible_number(reply), answer),
    }


TASK = Task(
    "T2_math",
    judge_math,
    primary="strict",
    max_new_tokens=256,
    sources={"": [Source("openai/gsm8k", convert_gsm8k, "main")]},
)
