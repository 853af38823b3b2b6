"""Benchmark files are looked at, every row of them, before the first answer."""

import json
import os

import pytest

from configs.command_line import UserError
from evaluation import questions
from evaluation.questions import benchmark_questions

GSM8K, MBPP = "gsm8k/test.jsonl", "mbpp/sanitized-mbpp.json"
XSTEST = "xstest/xstest_prompts.csv"
HARMFUL = "safety-tuned-llamas/I-MaliciousInstructions.json"
PROGRAM = {"prompt": "p", "test_list": ["assert True"], "test_imports": []}
CALL = {
    "id": "a",
    "question": [[{"content": "c"}]],
    "function": [{"name": "f", "parameters": {"required": []}}],
}


def mbpp(**changes):
    return {MBPP: json.dumps([PROGRAM, {**PROGRAM, **changes}])}


def bfcl(truth, **changes):
    name = "BFCL_v4_simple_python.json"
    return {
        f"bfcl/{name}": json.dumps({**CALL, **changes}),
        f"bfcl/possible_answer/{name}": json.dumps({"id": "a", "ground_truth": truth}),
    }


def gsm8k(question, answer):
    return {GSM8K: json.dumps({"question": question, "answer": answer})}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (mbpp(test_list=[]), "row 2: test_list is empty"),
        (mbpp(test_list=["assert f( =="]), "no Python"),
        (mbpp(test_list=["assert " + "-" * 100_000 + "1"]), "no Python"),
        (mbpp(test_list=[1]), "a test is 1, no text"),
        (mbpp(test_imports=None), "imports is None, no list"),
        (mbpp(test_imports="import os"), "no list"),
        (mbpp(prompt=5), "prompt is 5, no text"),
        (mbpp(prompt="\ud83d"), "half a surrogate"),
        ({MBPP: "[]"}, "no question of mbpp"),
        ({MBPP: "{}"}, "dict, no list"),
        ({MBPP: "[5]"}, "row 1"),
        ({GSM8K: ""}, "no question of gsm8k"),
        ({GSM8K: "[" * 100_000}, "line 1 is nested too deeply"),
        ({GSM8K: "5"}, "row 1"),
        (gsm8k(5, "#### 1"), "question is 5"),
        (gsm8k(" ", "#### 1"), "question is ' '"),
        (gsm8k("q", 5), "answer is 5"),
        (gsm8k("q", "5"), "no number after ####"),
        (bfcl([{"f": {}}], question=[[{"content": None}]]), "content is None"),
        (bfcl([{}]), "row 1"),
        (bfcl([{"f": {}, "g": {}}]), "row 1"),
        (bfcl([{"f": {"a": 5}}]), "accepted values"),
        (bfcl([{"f": {"a": [{"b": 5}]}}]), "accepted values"),
        (bfcl([]), "IndexError"),
        (bfcl([{"f": {}}], function=[{"name": "f", "parameters": {"required": None}}]), "no list"),
        ({XSTEST: "prompt,label\nhow,unsafe\n"}, "no question of xstest_safe"),
        ({XSTEST: "label,prompt\nunsafe\nsafe,a\n"}, "prompt is None"),
        ({XSTEST: "text,kind\na,safe\n"}, "label"),
        ({XSTEST: "prompt,label\n" + "x" * 200_000 + ",safe\n"}, "field"),
        ({HARMFUL: '{"instructions": [1, 2]}'}, "row 1"),
        ({HARMFUL: '{"instructions": null}'}, "no list"),
        ({HARMFUL: "[]"}, "cannot be read"),
    ],
)
def test_a_benchmark_that_cannot_be_asked_is_one_line(tmp_path, monkeypatch, files, message):
    monkeypatch.setattr(questions, "check_sandbox", lambda: None)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        benchmark_questions(str(tmp_path), 1)
    assert "\n" not in str(caught.value)


def test_a_benchmark_that_is_a_pipe_is_one_line(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    os.mkfifo(tmp_path / GSM8K)
    with pytest.raises(UserError, match="is no file"):
        benchmark_questions(str(tmp_path), 1)
