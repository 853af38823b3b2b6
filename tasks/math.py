"""T2: grade-school mathematics."""

import re

from tasks.extract import flexible_number, same_number, strict_number
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
    """Strict looks behind the last ####, flexible takes the last number: they part by format.

    Strict applies where the reference has that format, and flexible where it has a number at all:
    behind its ####, or its last one where it has none of them.
    """
    reference = row["output"]
    answer = strict_number(reference)
    last = answer if "####" in reference else flexible_number(reference)
    scores = {
        "strict": (strict_number(reply), answer),
        "flexible": (flexible_number(reply), last),
    }
    return {name: same_number(*both) for name, both in scores.items() if both[1] is not None}


TASK = Task(
    "T2_math",
    judge_math,
    primary="strict",
    max_new_tokens=256,
    sources={"": [Source("openai/gsm8k", convert_gsm8k, "main", license="mit")]},
)
