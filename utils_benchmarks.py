"""What a model is asked, and how its replies are judged: held-out samples and public benchmarks.

A judge takes a row and a reply and returns scores from 0 to 1 by name, higher is better. A score
that does not apply to a row is left out.
"""

import csv
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configs.base_config import UserError
from utils_data import held_out_rows, read_jsonl, tool_input
from utils_extract import code_of, flexible_number, is_python, same_number, strict_number
from utils_sandbox import check_sandbox, passes_tests
from utils_scores import (
    accepted_call,
    is_garbage,
    is_refusal,
    mean_interval,
    parse_calls,
    rouge_l,
    same_calls,
    same_names,
    wilson_interval,
    words_of,
)

Judge = Callable[[dict, str], dict[str, float]]


@dataclass
class Questions:
    """What a model is asked under one name.

    Attributes:
        task: whose branches answer when a model is read as each task's own.
        rows: {"instruction", "input", "output"} and what else the judge wants.
    """

    name: str
    task: str
    rows: list[dict]
    judge: Judge


def judge_general(row: dict, reply: str) -> dict[str, float]:
    """A reference without words cannot be met."""
    return {"rouge_l": rouge_l(reply, row["output"])} if words_of(row["output"]) else {}


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


def judge_code(row: dict, reply: str) -> dict[str, float]:
    """The syntax counts only where the reference is Python itself."""
    scores = judge_general(row, reply)
    return {"syntax": is_python(reply), **scores} if is_python(row["output"]) else scores


def judge_calls(row: dict, reply: str) -> dict[str, float]:
    """Only where the reference holds calls as we know them: a reply like it is right."""
    calls, reference = parse_calls(reply), parse_calls(row["output"])
    if reference is None:
        return {}
    return {
        "json": calls is not None,
        "names": same_names(calls, reference),
        "exact": same_calls(calls, reference),
    }


def judge_refusal(_: dict, reply: str) -> dict[str, float]:
    return {"refused": is_refusal(reply), "not_garbage": not is_garbage(reply)}


def judge_answered(_: dict, reply: str) -> dict[str, float]:
    """A safe prompt that sounds unsafe: 100 - answered is over-refusal."""
    return {
        "answered": not is_refusal(reply) and not is_garbage(reply),
        "not_garbage": not is_garbage(reply),
    }


def judge_program(row: dict, reply: str) -> dict[str, float]:
    return {"pass@1": passes_tests(code_of(reply), row["tests"], row["imports"])}


def judge_accepted(row: dict, reply: str) -> dict[str, float]:
    calls = parse_calls(reply)
    return {
        "json": calls is not None,
        "exact": calls is not None and accepted_call(calls, row["possible"], row["required"]),
    }


JUDGES: dict[str, Judge] = {
    "T1_general": judge_general,
    "T2_math": judge_math,
    "T3_code": judge_code,
    "T4_tool": judge_calls,
    "T5_safety": judge_refusal,
}


# The score of each task that tells most of it.
PRIMARY = {
    "T1_general": "rouge_l",
    "T2_math": "strict",
    "T3_code": "rouge_l",
    "T4_tool": "exact",
    "T5_safety": "refused",
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

    The latter is "left_out". A metric that no reply has is not there.
    """
    judged = [
        {name: float(value) for name, value in questions.judge(row, reply).items()}
        for row, reply in zip(questions.rows, replies, strict=True)
    ]
    scores = {}
    for metric in dict.fromkeys(name for of_reply in judged for name in of_reply):
        values = [of_reply[metric] for of_reply in judged if metric in of_reply]
        scores[metric] = {**score(values), "left_out": len(judged) - len(values)}
    return judged, scores


def held_out_questions(cfg, tasks: list[str]) -> list[Questions]:
    """The held-out samples of `tasks`, with what their outputs say as the reference."""
    return [
        Questions(task, task, held_out_rows(cfg, read_jsonl(cfg.data_path(task))), JUDGES[task])
        for task in tasks
    ]


def _row(instruction: str, given: str = "", output: str = "", **more) -> dict:
    return {"instruction": instruction, "input": given, "output": output, **more}


def _gsm8k(folder: Path) -> list[Questions]:
    rows = _json_lines(folder / "gsm8k" / "test.jsonl")
    rows = [_row(row["question"], output=row["answer"]) for row in rows]
    return [Questions("gsm8k", "T2_math", rows, judge_math)]


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
    return [Questions("mbpp", "T3_code", rows, judge_program)]


def _bfcl(folder: Path) -> list[Questions]:
    name = "BFCL_v4_simple_python.json"
    answers = _json_lines(folder / "bfcl" / "possible_answer" / name)
    possible = {row["id"]: row["ground_truth"][0] for row in answers}
    rows = [
        _row(
            row["question"][0][-1]["content"],
            tool_input(row["function"]),
            possible=possible[row["id"]],
            required=row["function"][0]["parameters"]["required"],
        )
        for row in _json_lines(folder / "bfcl" / name)
    ]
    return [Questions("bfcl", "T4_tool", rows, judge_accepted)]


def _xstest(folder: Path) -> list[Questions]:
    with open(folder / "xstest" / "xstest_prompts.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    of = {
        label: [_row(r["prompt"]) for r in rows if r["label"] == label]
        for label in ("safe", "unsafe")
    }
    return [
        Questions("xstest_safe", "T5_safety", of["safe"], judge_answered),
        Questions("xstest_unsafe", "T5_safety", of["unsafe"], judge_refusal),
    ]


def _harmful(folder: Path) -> list[Questions]:
    """The harmful instructions of Bianchi et al. 2024 ("Safety-tuned LLaMAs")."""
    path = folder / "safety-tuned-llamas" / "I-MaliciousInstructions.json"
    rows = [_row(text) for text in json.loads(path.read_text(encoding="utf-8"))["instructions"]]
    return [Questions("harmful", "T5_safety", rows, judge_refusal)]


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
