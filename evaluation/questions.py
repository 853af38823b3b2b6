"""What a model is asked, and how its replies are judged: held-out samples and public benchmarks.

A judge takes a row and a reply and returns scores from 0 to 1 by name, higher is better. A score
that does not apply to a row is left out.
"""

import csv
import io
import random
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from configs.command_line import UserError, is_first
from evaluation.sandbox import SandboxFault, check_sandbox, passes_tests
from models.reading import MIB, parse_json, read_json, read_text
from tasks import code, find_task, judged_task, math, safety, tool
from tasks.extract import code_of, strict_number
from tasks.scores import (
    accepted_call,
    is_garbage,
    is_refusal,
    mean_interval,
    parse_calls,
    wilson_interval,
)
from tasks.task import Judge, Task

# The largest public benchmark has one.
MOST_BYTES = 64 * MIB


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


def _rows(values, row_of) -> list[dict]:
    """`row_of` each value; ValueError, with the number of the row, where it has not what it takes.

    So that what is wrong shows before the first answer, and not at the row.
    """
    if not isinstance(values, list):
        raise ValueError(f"it is {type(values).__name__}, no list")
    rows = []
    for number, value in enumerate(values, 1):
        try:
            rows.append(row_of(value))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"row {number}: {error!r}") from error
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
    return rows


def _text(value, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} is {value!r:.60}, no text")
    return value


def _list(value, what: str) -> list:
    if not isinstance(value, list):
        raise ValueError(f"{what} is {value!r:.60}, no list")
    return value


def _gsm8k_row(row: dict) -> dict:
    answer = _text(row["answer"], "answer")
    if strict_number(answer) is None:
        raise ValueError("answer holds no number after ####")
    return _row(_text(row["question"], "question"), output=answer)


def _gsm8k(folder: Path) -> list[Questions]:
    rows = _rows(_json_lines(folder / "gsm8k" / "test.jsonl"), _gsm8k_row)
    return [Questions("gsm8k", math.TASK.name, rows, math.judge_math)]


def _program(value, what: str) -> str:
    try:
        compile(_text(value, what), "<test>", "exec")
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{what} is no Python ({error})") from error
    return value


def _mbpp_row(row: dict) -> dict:
    tests = [_program(test, "a test") for test in _list(row["test_list"], "test_list")]
    if not tests:
        raise ValueError("test_list is empty")
    return _row(
        _text(row["prompt"], "prompt"),
        # The tests name the function that they call.
        "Your code should pass these tests:\n" + "\n".join(tests),
        tests=tests,
        imports=[_program(line, "an import") for line in _list(row["test_imports"], "imports")],
    )


def _mbpp(folder: Path) -> list[Questions]:
    check_sandbox()
    path = folder / "mbpp" / "sanitized-mbpp.json"
    rows = _rows(read_json(path, MOST_BYTES), _mbpp_row)
    return [Questions("mbpp", code.TASK.name, rows, judge_program)]


def _bfcl_row(row: dict, possible: dict[str, dict]) -> dict:
    ((_, arguments),) = possible[row["id"]].items()
    function = row["function"][0]
    required = [_text(name, "required") for name in _list(function["parameters"]["required"], "it")]
    if not isinstance(arguments, dict) or not _is_accepted(arguments):
        raise ValueError("ground_truth holds no list of accepted values for each argument")
    return _row(
        _text(row["question"][0][-1]["content"], "content"),
        tool.tool_input(row["function"]),
        possible=possible[row["id"]],
        required=required,
    )


def _is_accepted(values) -> bool:
    """Whether each key of the objects in `values` has a list of accepted values."""
    if isinstance(values, dict):
        return all(isinstance(v, list) and _is_accepted(v) for v in values.values())
    return not isinstance(values, list) or all(map(_is_accepted, values))


def _bfcl(folder: Path) -> list[Questions]:
    name = "BFCL_v4_simple_python.json"
    answers = _json_lines(folder / "bfcl" / "possible_answer" / name)
    possible = {row["id"]: row["ground_truth"][0] for row in answers}
    rows = _rows(_json_lines(folder / "bfcl" / name), lambda row: _bfcl_row(row, possible))
    return [Questions("bfcl", tool.TASK.name, rows, judge_accepted)]


def _xstest(folder: Path) -> list[Questions]:
    text = read_text(folder / "xstest" / "xstest_prompts.csv", MOST_BYTES)
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise ValueError(str(error)) from error
    of = {
        label: _rows(
            [r for r in rows if r["label"] == label], lambda r: _row(_text(r["prompt"], "prompt"))
        )
        for label in ("safe", "unsafe")
    }
    return [
        Questions("xstest_safe", safety.TASK.name, of["safe"], judge_answered),
        Questions("xstest_unsafe", safety.TASK.name, of["unsafe"], safety.judge_refusal),
    ]


def _harmful(folder: Path) -> list[Questions]:
    """The harmful instructions of Bianchi et al. 2024 ("Safety-tuned LLaMAs")."""
    path = folder / "safety-tuned-llamas" / "I-MaliciousInstructions.json"
    texts = read_json(path, MOST_BYTES)["instructions"]
    rows = _rows(texts, lambda text: _row(_text(text, "it")))
    return [Questions("harmful", safety.TASK.name, rows, safety.judge_refusal)]


def _json_lines(path: Path) -> list:
    lines = read_text(path, MOST_BYTES).split("\n")
    return [
        parse_json(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


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
            asked = read(Path(folder))
            if empty := [questions.name for questions in asked if not questions.rows]:
                raise ValueError(f"no question of {', '.join(empty)}")
        except (ValueError, KeyError, IndexError, TypeError) as error:
            fault = str(error) if isinstance(error, ValueError) else repr(error)
            raise UserError(
                f"--benchmarks {folder}: {name} cannot be read ({fault}); fetch it again, or "
                "remove its folder"
            ) from error
        found += asked
    if not found:
        raise UserError(
            f"--benchmarks {folder}: none of the folders {', '.join(BENCHMARKS)} is there"
        )
    for questions in found:
        if most and most < len(questions.rows):
            # Of all kinds: files are sorted by kind. The same ones for every model.
            questions.rows = random.Random(questions.name).sample(questions.rows, most)
    return found
