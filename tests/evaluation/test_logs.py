"""Logs and summaries that others have written to: one line for each fault, and no traceback."""

import json

import pytest
from helpers import errors, write_run

import plot_loss
from evaluation.logs import LARGEST

LINE = {"step": 1, "epoch": 1, "loss": 2.0}
HELD_OUT = {"stage": "base", "eval_task": "A", "loss": 2.0}
MATRIX = [[5.0, 5.0], [2.0, 4.0], [3.0, 1.0]]
NO_JSON = ("9" * 5000, "[" * 100_000, '"step epoch loss"', "[]", '{"step": 1', "null")
NO_NUMBERS = ("2.0", [1], {}, True, 10**400, 10 * LARGEST, -10 * LARGEST)


def one_fault(capsys, *argv) -> str:
    assert plot_loss.main([*map(str, argv)]) == 2
    (line,) = errors(capsys)
    return line


@pytest.mark.parametrize(
    "line",
    [
        *NO_JSON,
        *(json.dumps({**LINE, "loss": loss}) for loss in (*NO_NUMBERS, None)),
        *(json.dumps({**LINE, "step": step}) for step in ("a", None, -1, 1.5, [1])),
        *(json.dumps({**LINE, "epoch": epoch}) for epoch in ("a", None, 0, 1.5, [1])),
        json.dumps(LINE).replace("2.0", "NaN"),
        json.dumps(LINE).replace("2.0", "Infinity"),
        '{"step": 1, "epoch": 1}',
    ],
)
def test_a_line_of_a_single_run_that_is_none(tmp_path, capsys, line):
    (tmp_path / "single_T_train_loss.jsonl").write_text(f"{json.dumps(LINE)}\n{line}\n")
    (tmp_path / "single_T_eval_loss.jsonl").write_text(json.dumps(LINE) + "\n")
    fault = one_fault(capsys, "single", "T", "--log_dir", tmp_path)
    assert "single_T_train_loss.jsonl, line 2" in fault and "remove the line" in fault


@pytest.mark.parametrize(
    "line",
    [
        *NO_JSON,
        *(json.dumps({**HELD_OUT, "loss": loss}) for loss in (*NO_NUMBERS, None)),
        *(json.dumps({**HELD_OUT, "stage": stage}) for stage in (None, ["x"], 1)),
        json.dumps({**HELD_OUT, "eval_task": {}}),
        json.dumps({**HELD_OUT, "branches": 1}),
    ],
)
def test_a_line_of_a_sequence_that_is_none(tmp_path, capsys, line):
    (tmp_path / "seq_eval_loss.jsonl").write_text(f"{json.dumps(HELD_OUT)}\n{line}\n")
    assert "line 2" in one_fault(capsys, "seq", "--log_dir", tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_a_sequence_with_other_readings_alone(tmp_path, capsys):
    line = json.dumps({**HELD_OUT, "branches": "own"})
    (tmp_path / "seq_eval_loss.jsonl").write_text(line + "\n")
    assert "no loss of the model as it is" in one_fault(capsys, "seq", "--log_dir", tmp_path)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        *(
            ({"matrix": m}, "matrix")
            for m in ([], None, [["a"] * 2] * 3, [[1.0]], [[None] * 2] * 3)
        ),
        *(({"tasks": tasks}, "matrix") for tasks in (["A"], ["A", "B", "C"])),
        *(({"tasks": tasks}, "tasks") for tasks in ([], None, [1, 2], "AB")),
        *(({"forgetting": value}, "forgetting") for value in NO_NUMBERS),
        *(({"config": config}, "config") for config in (None, {}, {"seed": [1]}, {"seed": "1"})),
        *(({"stages": s}, "stages") for s in ({}, None, "B", {"A": {}, "B": {}}, {"A": 1})),
        ({"stages": {t: {"train_seconds": 1.0, "bytes_kept": "x"} for t in "AB"}}, "stages"),
        ({"stages": {t: {"train_seconds": 1.0, "samples_a_step": 8} for t in "AB"}}, "stages"),
        *(({"accuracy": accuracy}, "accuracy") for accuracy in ([], {"matrix": [[1.0]]})),
    ],
)
def test_a_summary_that_is_none(tmp_path, capsys, change, part):
    run = write_run(tmp_path / "run", MATRIX)
    path = tmp_path / "run" / "seq_summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    fault = one_fault(capsys, "compare", run, "--log_dir", tmp_path)
    assert f"{path} is no summary of a run ({part}" in fault


@pytest.mark.parametrize("text", ["[]", "null", "[" * 100_000, "9" * 5000, "", "{}"])
def test_a_summary_of_other_json(tmp_path, capsys, text):
    run = write_run(tmp_path / "run", MATRIX)
    (tmp_path / "run" / "seq_summary.json").write_text(text)
    assert "seq_summary.json" in one_fault(capsys, "compare", run, "--log_dir", tmp_path)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("seq_drift", {"stage": "B", "probe_task": "A", "teacher": "A", "kl_first": None}),
        ("seq_drift", {"stage": "B", "probe_task": "A", "teacher": "A", "kl_first": "x"}),
        ("scores_B", {"task": "A", "metric": "m", "branches": "own", "score": None}),
        ("scores_B", {"task": "A", "metric": "m", "branches": "own", "score": "x"}),
    ],
)
def test_other_logs_of_a_run(tmp_path, capsys, name, line):
    run = write_run(tmp_path / "run", MATRIX)
    (tmp_path / "run" / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    fault = one_fault(capsys, "compare", run, "--log_dir", tmp_path)
    assert f"{name}.jsonl, line 1" in fault


@pytest.mark.parametrize("name", [r"$\frac$", "a$b$c", "new\nline", "caf\udce9", "漢字"])
def test_any_name_of_a_run(tmp_path, capsys, name):
    write_run(tmp_path / "run", MATRIX)
    run, other = (tmp_path / "run").rename(tmp_path / name), write_run(tmp_path / "other", MATRIX)
    assert plot_loss.main(["compare", str(run), other, "--log_dir", str(tmp_path)]) == 0
    assert "other" in (tmp_path / "compare.md").read_text(encoding="utf-8")


def test_a_picture_of_very_many_tasks_stays_small(tmp_path):
    rows = ({**HELD_OUT, "stage": s, "eval_task": f"t{i}"} for s in "ab" for i in range(300))
    (tmp_path / "seq_eval_loss.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert plot_loss.main(["seq", "--log_dir", str(tmp_path)]) == 0
    size = plot_loss.plt.imread(tmp_path / "seq_eval_loss.png").shape
    assert max(size) < 10_000
