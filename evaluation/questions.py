"""What a model is asked, and how its replies are judged: held-out samples and public benchmarks.

A judge takes a row and a reply and returns scores from 0 to 1 by name, higher is better. A score
that does not apply to a row is left out.
"""

import csv
import json
import random
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from configs.command_line import UserError, is_first
from evaluation.sandbox import SandboxFault, check_sandbox, passes_tests
from tasks import code, find_task, judged_task, math, safety, tool
from tasks.extract import code_of
from tasks.scores import (
    accepted_call,
    is_garbage,
    is_refusal,
    mean_interval,
    parse_calls,
    wilson_interval,
)
from tasks.task import Judge, Task


@dataclass
class Questions:
    """What a model is asked under one name.

    Attributes:
        task: whose branches answer when a model is read as each task's own.
        rows: {"instruction", "input", "output"} and what else the judge wants.
        about: the task whose replies they are like.
    """

    name: str
    task: str
    rows: list[dict]
    judge: Judge
    about: Task | None = None

    def __post_init__(self):
        self.about = self.about or find_task(self.task)


def judge_answered(_: dict, reply: str) -> dict[str, float]:
    """A safe prompt that sounds unsafe: 100 - answered is over-refusal."""
    return {
        "answered": not is_refusal(reply) and not is_garbage(reply),
        "not_garbage": not is_garbage(reply),
    }


def judge_program(row: dict, reply: str) -> dict[str, float]:
    """No score where the sandbox failed: that says nothing about the program."""
    try:
        return {"pass@1": passes_tests(code_of(reply), row["tests"], row["imports"])}
    except SandboxFault as fault:
        warnings.warn(f"a program could not be judged: {fault}", stacklevel=2)
        return {}


def judge_accepted(row: dict, reply: str) -> dict[str, float]:
    calls = parse_calls(reply)
    return {
        "json": calls is not None,
        "exact": calls is not None and accepted_call(calls, row["possible"], row["required"]),
    }


def score(values: list[float]) -> dict[str, float]:
    """{"score", "low", "high", "n"}: 0 to 100 with a 95 % interval, of values from 0 to 1.

    Wilson's interval where all are right or wrong, else the bootstrap's.
    """
    values = [float(value) for value in values]
    if set(values) <= {0.0, 1.0}:
        low, high = wilson_interval(int(sum(values)), len(values))
    else:
        low, high = mean_interval(values)
    mean = sum(values) / len(values)
    return {"score": 100 * mean, "low": 100 * low, "high": 100 * high, "n": len(values)}


def judge_all(questions: Questions, replies: list[str]) -> tuple[list[dict], dict[str, dict]]:
    """(the scores of each reply, metric -> `score` of all that have it, and how many have not).

    The latter is "left_out". A metric that no reply has is not there. Warns how many have none.
    """
    judged = [
        {name: float(value) for name, value in questions.judge(row, reply).items()}
        for row, reply in zip(questions.rows, replies, strict=True)
    ]
    unjudged = judged.count({})
    if unjudged and is_first():
        told = f"{questions.name}: {unjudged} of {len(judged)} answers could not be judged"
        print(f"warning: {told} and are in no score", file=sys.stderr)
    scores = {}
    for metric in dict.fromkeys(name for of_reply in judged for name in of_reply):
        values = [of_reply[metric] for of_reply in judged if metric in of_reply]
        scores[metric] = {**score(values), "left_out": len(judged) - len(values)}
    return judged, scores


def held_out_questions(cfg, task: str, rows: list[dict], outputs: list[str]) -> Questions:
    """The held-out rows of `task`, with what their outputs say as the reference.

    `outputs` of its training rows decide how an own task is judged, where `cfg` does not.
    """
    about = judged_task(task, cfg.judge_of(task), outputs)
    return Questions(task, task, rows, about.judge, about)


def _row(instruction: str, given: str = "", output: str = "", **more) -> dict:
    return {"instruction": instruction, "input": given, "output": output, **more}


def _gsm8k(folder: Path) -> list[Questions]:
    rows = _json_lines(folder / "gsm8k" / "test.jsonl")
    rows = [_row(row["question"], output=row["answer"]) for row in rows]
    return [Questions("gsm8k", math.TASK.name, rows, math.judge_math)]


def _mbpp(folder: Path) -> list[Questions]:
    check_sandbox()
    listed = json.loads((folder / "mbpp" / "sanitized-mbpp.json").read_text(encoding="utf-8"))
    rows = [
        # The tests name the function that they call.
        _row(
            row["prompt"],
            "Your code should pass these tests:\n" + "\n".join(row["test_list"]),
            tests=row["test_list"],
            imports=row["test_imports"],
        )
        for row in listed
    ]
    return [Questions("mbpp", code.TASK.name, rows, judge_program)]


def _bfcl(folder: Path) -> list[Questions]:
    name = "BFCL_v4_simple_python.json"
    answers = _json_lines(folder / "bfcl" / "possible_answer" / name)
    possible = {row["id"]: row["ground_truth"][0] for row in answers}
    rows = [
        _row(
            row["question"][0][-1]["content"],
            tool.tool_input(row["function"]),
            possible=possible[row["id"]],
            required=row["function"][0]["parameters"]["required"],
        )
        for row in _json_lines(folder / "bfcl" / name)
    ]
    return [Questions("bfcl", tool.TASK.name, rows, judge_accepted)]


def _xstest(folder: Path) -> list[Questions]:
    with open(folder / "xstest" / "xstest_prompts.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    of = {
        label: [_row(r["prompt"]) for r in rows if r["label"] == label]
        for label in ("safe", "unsafe")
    }
    return [
        Questions("xstest_safe", safety.TASK.name, of["safe"], judge_answered),
        Questions("xstest_unsafe", safety.TASK.name, of["unsafe"], safety.judge_refusal),
    ]


def _harmful(folder: Path) -> list[Questions]:
    """The harmful instructions of Bianchi et al. 2024 ("Safety-tuned LLaMAs")."""
    path = folder / "safety-tuned-llamas" / "I-MaliciousInstructions.json"
    rows = [_row(text) for text in json.loads(path.read_text(encoding="utf-8"))["instructions"]]
    return [Questions("harmful", safety.TASK.name, rows, safety.judge_refusal)]


def _json_lines(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


BENCHMARKS = {
    "gsm8k": _gsm8k,
    "mbpp": _mbpp,
    "bfcl": _bfcl,
    "xstest": _xstest,
    "safety-tuned-llamas": _harmful,
}


def benchmark_questions(folder: str, most: int) -> list[Questions]:
    """The benchmarks found in `folder`, a random choice of at most `most` questions (0: all).

    Raises `UserError` where there is none, or where one is damaged.
    """
    found = []
    for name, read in BENCHMARKS.items():
        if not (Path(folder) / name).is_dir():
            continue
        try:
            found += read(Path(folder))
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"--benchmarks {folder}: {name} cannot be read ({error!r}); fetch it again, or "
                "remove its folder"
            ) from error
    if not found:
        raise UserError(
            f"--benchmarks {folder}: none of the folders {', '.join(BENCHMARKS)} is there"
        )
    for questions in found:
        if most and most < len(questions.rows):
            # Of all kinds: files are sorted by kind. The same ones for every model.
            questions.rows = random.Random(questions.name).sample(questions.rows, most)
    return found
