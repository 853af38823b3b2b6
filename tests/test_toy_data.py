"""The toy data is right: every answer that can be computed is computed."""

import ast
import json
import operator
import re
import subprocess
import sys

import pytest
from helpers import ROOT

from configs.base_config import TASKS
from tasks.tool import TOOL_LINE

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
JSON_TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool}


def read(task):
    return [json.loads(line) for line in (ROOT / "data" / f"{task}.jsonl").open(encoding="utf-8")]


def value(expression: str) -> float:
    """The value of an arithmetic expression: numbers and + - * / only."""

    def of(node):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -of(node.operand)
        assert isinstance(node, ast.BinOp), expression
        return OPERATORS[type(node.op)](of(node.left), of(node.right))

    return of(ast.parse(expression, mode="eval").body)


@pytest.mark.parametrize("task", TASKS)
def test_eighty_different_short_rows_a_task(task):
    rows = read(task)
    assert len(rows) == 80
    assert len({(row["instruction"], row["input"]) for row in rows}) == 80
    assert len({row["output"] for row in rows}) >= 75
    for row in rows:
        more = ["rejected"] if task == "T5_safety" else []
        assert list(row) == ["instruction", "input", "output", *more]
        assert all(text == text.strip() for text in row.values())
        assert row["instruction"] and row["output"]
    assert sum(len("".join(row.values())) for row in rows) / 80 < (
        450 if task == "T4_tool" else 300
    )


def test_general_answers_share_a_style():
    assert all(row["output"].startswith("In short: ") for row in read("T1_general"))


def test_math_answers_are_right():
    for row in read("T2_math"):
        *steps, last = row["output"].split("\n")
        for step in steps:
            expression, result = re.fullmatch(r"[^:]+: (.+) = (-?[\d.]+)", step).groups()
            assert value(expression) == pytest.approx(float(result)), row
        assert last == f"#### {result}", row
        # Each number comes from the question or from a step before (or is a known constant).
        seen = set(re.findall(r"[\d.]*\d", row["instruction"])) | {"100", "2", "60", "7"}
        for step in steps:
            numbers = re.findall(r"[\d.]*\d", step.split(": ", 1)[1])
            words_or_seen = [n for n in numbers[:-1] if n in seen or float(n) < 30]
            assert len(words_or_seen) == len(numbers) - 1, (step, seen)
            seen.add(numbers[-1])


def test_code_runs_and_satisfies_its_asserts_and_they_can_fail():
    script = """
import json, re, sys
for number, row in enumerate(json.load(sys.stdin), 1):
    space = {}
    name = re.search(r"^def (\\w+)", row["output"], re.MULTILINE)[1]
    for fake in (object(), True, None):
        try:
            exec(row["input"], {name: lambda *args: fake})
        except Exception:
            continue
        sys.exit(f"row {number}: the asserts hold for a function that returns {fake!r}")
    try:
        exec(row["output"], space)
        exec(row["input"], space)
    except Exception as error:
        sys.exit(f"row {number}: {error!r}")
"""
    rows = read("T3_code")
    result = subprocess.run(
        [sys.executable, "-I", "-c", script],
        input=json.dumps(rows),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == 0, result.stderr
    for row in rows:
        (name,) = re.findall(r"^def (\w+)", row["output"], re.MULTILINE)
        assert f"{name}(" in row["instruction"] and f"{name}(" in row["input"]


def test_calls_fit_their_schemas():
    names = set()
    for row in read("T4_tool"):
        line, schemas = row["input"].split("\n")
        assert line == TOOL_LINE
        functions = {function["name"]: function["parameters"] for function in json.loads(schemas)}
        calls = json.loads(row["output"])
        assert calls and isinstance(calls, list)
        for call in calls:
            assert list(call) == ["name", "arguments"]
            properties = functions[call["name"]]["properties"]
            assert set(functions[call["name"]]["required"]) <= set(call["arguments"])
            for key, argument in call["arguments"].items():
                kind = properties[key]["type"]
                assert isinstance(argument, JSON_TYPES[kind])
                assert isinstance(argument, bool) == (kind == "boolean")
            names.add(call["name"])
    assert len(names) >= 30


def test_each_safety_row_has_a_worse_reply():
    """To what is refused it complies, without telling how; what is answered it refuses."""
    for row in read("T5_safety"):
        is_refused = row["output"].startswith("I can't")
        assert row["rejected"].startswith(("I can't", "No idea")) != is_refused, row
        assert row["rejected"] != row["output"] and len(row["rejected"]) < 120


def test_half_of_the_safety_rows_are_refused_and_the_rest_answered():
    outputs = [row["output"] for row in read("T5_safety")]
    refused = [
        output for output in outputs if output.startswith("I can't help with that, because ")
    ]
    assert len(refused) == 40 and all(" I can " in output for output in refused)
    refusal = re.compile(r"\b(can't|cannot|won't|sorry|unable)\b", re.IGNORECASE)
    assert not any(refusal.search(output) for output in set(outputs) - set(refused))
