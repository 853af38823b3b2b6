"""Metrics on hand-made matrices; the pictures' complaints."""

import json
import math

import pytest

import plot_loss
from utils_metrics import (
    average_final,
    backward_transfer,
    forgetting,
    format_matrix,
    loss_matrix,
    summarise,
)

NAN = math.nan
# Task 1 gets better before it gets worse; task 2 is forgotten a little.
LOSSES = [[5.0, 5.0, 5.0], [2.0, NAN, NAN], [1.5, 3.0, NAN], [2.5, 3.2, 1.0]]


def test_metrics_by_hand():
    assert average_final(LOSSES) == pytest.approx((2.5 + 3.2 + 1.0) / 3)
    assert forgetting(LOSSES) == pytest.approx((1.0 + 0.2) / 2)
    assert backward_transfer(LOSSES) == pytest.approx((-0.5 - 0.2) / 2)


def test_for_scores_larger_is_better():
    scores = [[-x for x in row] for row in LOSSES]
    assert forgetting(scores, lower_is_better=False) == pytest.approx(0.6)
    assert backward_transfer(scores, lower_is_better=False) == pytest.approx(-0.35)


def test_improvement_is_not_clipped():
    losses = [[5.0, 5.0], [2.0, NAN], [1.0, 3.0]]
    assert forgetting(losses) == pytest.approx(-1.0)
    assert backward_transfer(losses) == pytest.approx(1.0)


def test_one_task_has_no_forgetting():
    summary = summarise([[5.0], [2.0]])
    assert summary["average_final_loss"] == 2.0
    assert math.isnan(summary["forgetting"]) and math.isnan(summary["backward_transfer"])
    assert "forgetting" not in format_matrix([[5.0], [2.0]], ["T1_general"])


def test_the_matrix_comes_from_the_log():
    lines = [
        {"stage": "base", "eval_task": "A", "loss": 5.0},
        {"stage": "base", "eval_task": "B", "loss": 6.0},
        {"stage": "A", "eval_task": "A", "loss": 2.0},
        {"stage": "B", "eval_task": "A", "loss": 3.0},
        {"stage": "B", "eval_task": "B", "loss": 4.0},
    ]
    matrix = loss_matrix(lines, ["A", "B"])
    assert matrix[0] == [5.0, 6.0] and matrix[2] == [3.0, 4.0]
    assert matrix[1][0] == 2.0 and math.isnan(matrix[1][1])
    text = format_matrix(matrix, ["A", "B"])
    assert "lower is better" in text and "forgetting         +1.000 (positive = forgotten)" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing: run python train_slsd_seq.py first"),
        ("", "is empty"),
        ('{"stage": "base"', "line 1: damaged"),
        ('{"stage": "base", "loss": 1}', "line 1: 'eval_task' is missing"),
        ("3", "line 1: damaged"),
    ],
)
def test_a_log_that_cannot_be_drawn_is_one_line(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "seq_eval_loss.jsonl").write_text(content)
    assert plot_loss.main(["seq", "--log_dir", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    "argv", [[], ["what"], ["single"], ["seq", "T2_math"], ["seq", "--log", "x"]]
)
def test_a_wrong_command_is_one_line(argv, capsys):
    assert plot_loss.main(argv) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")


def test_a_run_that_is_not_finished_can_be_drawn(tmp_path):
    rows = [
        {"stage": "base", "eval_task": "T1_general", "branches": "latest", "loss": 3.0},
        {"stage": "base", "eval_task": "T2_math", "branches": "latest", "loss": 3.0},
        {"stage": "T1_general", "eval_task": "T1_general", "branches": "latest", "loss": 2.0},
        {"stage": "T1_general", "eval_task": "T1_general", "branches": "slow", "loss": 99.0},
    ]
    (tmp_path / "seq_eval_loss.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert plot_loss.main(["seq", "--log_dir", str(tmp_path)]) == 0
