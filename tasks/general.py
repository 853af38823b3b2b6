"""T1: general instructions."""

import re

from tasks.scores import rouge_l, words_of
from tasks.source import Sample, Source, texts, without_placeholders
from tasks.task import Task


def convert_alpaca(row: dict) -> Sample:
    """tatsu-lab/alpaca and sahil2801/CodeAlpaca-20k; many spellings of "no input" become ""."""
    instruction, given, output = texts(row, "instruction", "input", "output")
    given, output = without_placeholders(given, output)
    return Sample(instruction, given, output)


def convert_dolly(row: dict) -> Sample:
    """databricks/databricks-dolly-15k: context is the input; Wikipedia's citation marks go."""
    instruction, context, response = texts(row, "instruction", "context", "response")
    # This takes x[3] too, but not x[0]: dolly has many marks, from 1 on, and hardly any code.
    context, response = (
        re.sub(r"(?<=[\w.,;:)\"'])(\[[1-9]\d*\])+", "", text) for text in (context, response)
    )
    return Sample(instruction, context, response)


def judge_general(row: dict, reply: str) -> dict[str, float]:
    """A reference without words cannot be met."""
    return {"rouge_l": rouge_l(reply, row["output"])} if words_of(row["output"]) else {}


TASK = Task(
    "T1_general",
    judge_general,
    primary="rouge_l",
    sources={
        "": [
            Source("tatsu-lab/alpaca", convert_alpaca, license="cc-by-nc-4.0"),
            Source("databricks/databricks-dolly-15k", convert_dolly, license="cc-by-sa-3.0"),
        ]
    },
    # A row of one is a copy of the other's: general instructions hold code tasks too.
    overlaps="T3_code",
)
