"""Metrics on hand-made matrices, and their tables."""

import math

import numpy as np
import pytest

from evaluation.matrix import (
    average_final,
    average_incremental,
    backward_transfer,
    forgetting,
    format_costs,
    format_matrix,
    format_samples,
    format_score_matrix,
    forward_transfer,
    learning,
    loss_matrix,
    retention,
    score_matrix,
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


def test_the_metrics_that_need_the_base_by_hand():
    assert learning(LOSSES) == pytest.approx((2.0 + 3.0 + 1.0) / 3)
    assert average_incremental(LOSSES) == pytest.approx((2.0 + 2.25 + 6.7 / 3) / 3)
    # Of 3 and 2 nats that tasks 1 and 2 gained over the base, 2.5 and 1.8 are left.
    assert retention(LOSSES) == pytest.approx(4.3 / 5)
    assert math.isnan(forward_transfer(LOSSES))
    full = [[5.0, 5.0, 5.0], [2.0, 4.0, 6.0], [1.5, 3.0, 4.5], [2.5, 3.2, 1.0]]
    assert forward_transfer(full) == pytest.approx((1.0 + 0.5) / 2)
    assert math.isnan(retention([[5.0, 5.0], [6.0, NAN], [6.0, 3.0]]))


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("missing", [0, 4])
def test_the_metrics_against_arrays(lower, missing):
    """The same formulas over whole arrays, with numpy's own handling of missing cells."""
    for seed in range(20):
        draw = np.random.default_rng(seed)
        A = draw.normal(size=(6, 5))
        A.flat[draw.choice(np.arange(5, 30), missing, replace=False)] = np.nan
        # The cells that the sums below need; a matrix without them is another test's.
        A[[1, 5], 0] = draw.normal(size=2)
        sign = 1 if lower else -1
        just, last, base = np.diagonal(A[1:]), A[-1], A[0]
        matrix = A.tolist()
        assert average_final(matrix) == pytest.approx(np.nanmean(last))
        assert learning(matrix) == pytest.approx(np.nanmean(just))
        # A task without a score, as one without options, has none after any stage.
        at_end = ~np.isnan(last)
        seen = [A[t, :t][at_end[:t]] for t in range(1, 6)]
        seen = (
            NAN
            if np.isnan(np.concatenate(seen)).any()
            else np.mean([np.mean(row) for row in seen if len(row)])
        )
        assert average_incremental(matrix) == pytest.approx(seen, nan_ok=True)
        assert backward_transfer(matrix, lower) == pytest.approx(
            np.nanmean(sign * (just - last)[:-1])
        )
        best = [np.nanmin(sign * A[i + 1 : 5, i], initial=np.inf) for i in range(4)]
        best = np.where(np.isinf(best), np.nan, best)
        assert forgetting(matrix, lower) == pytest.approx(np.nanmean(sign * last[:-1] - best))
        before = np.array([A[i, i] for i in range(1, 5)])
        assert forward_transfer(matrix, lower) == pytest.approx(
            np.nanmean(sign * (base[1:] - before))
        )
        kept, gained = sign * (base - last)[:-1], sign * (base - just)[:-1]
        known = ~np.isnan(kept + gained)
        expected = kept[known].sum() / gained[known].sum() if gained[known].sum() > 0 else NAN
        assert retention(matrix, lower) == pytest.approx(expected, nan_ok=True)


def test_answers_are_told_stage_by_stage_and_cannot_steer_a_terminal():
    samples = [
        {"stage": "A", "task": "A", "number": 0, "reply": "one\ntwo \x1b[31mred"},
        {"stage": "BB", "task": "A", "number": 0, "reply": "x" * 30},
    ]
    lines = format_samples(samples, {"A": ["the reference"]}, width=20).splitlines()
    assert lines[2:] == [
        "A, question 1",
        "reference  the reference",
        "A          one two [31mred",
        f"BB         {'x' * 17}...",
    ]


def test_scores_have_a_matrix_of_their_own():
    lines = [
        {"stage": stage, "task": task, "metric": metric, "score": score}
        for stage, task, metric, score in (
            ("base", "A", "right", 5.0),
            ("A", "A", "right", 60.0),
            ("A", "A", "other", 99.0),
            ("B", "A", "right", 40.0),
            ("B", "B", "good", 80.0),
        )
    ]
    metrics = {"A": "right", "B": "good"}
    matrix = score_matrix(lines, metrics)
    assert matrix[2] == [40.0, 80.0] and matrix[0][0] == 5.0 and math.isnan(matrix[0][1])
    text = format_score_matrix(matrix, metrics)
    assert "forgetting         +20.0" in text and "backward transfer  -20.0" in text


def test_what_a_run_keeps_and_reads_is_told_by_stage():
    told = {"backward": 16.0, "forward": 0.5}
    stages = {
        "A": {"samples_kept": 48, "bytes_kept": 3 * 2**20 // 2, "samples_a_step": told},
        "B": {},  # begun before this was noted
    }
    lines = format_costs(stages).splitlines()[2:]
    assert lines[0].split("  ")[0] == "stage" and "MiB kept" in lines[0]
    assert lines[1].split() == ["A", "48.0", "1.5", "16.0", "0.5"] and lines[2] == "B"
