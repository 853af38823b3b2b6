"""Metrics on hand-made matrices; the pictures' complaints."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

import plot_loss
from evaluation.matrix import (
    average_final,
    average_incremental,
    backward_transfer,
    forgetting,
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
        seen = [
            np.nanmean(A[t, :t]) if not np.isnan(A[t, :t]).all() else np.nan for t in range(1, 6)
        ]
        assert average_incremental(matrix) == pytest.approx(np.nanmean(seen))
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


def write_run(folder, matrix, drift=(), readings=None, is_one_model=True, **config):
    """The log folder of a finished run over the tasks A, B, ..."""
    tasks = [chr(ord("A") + i) for i in range(len(matrix[0]))]
    cells = [[None if math.isnan(x) else x for x in row] for row in matrix]
    metrics = {k: None if math.isnan(v) else v for k, v in summarise(matrix).items()}
    stages = {task: {"train_seconds": 60.0, "evaluate_seconds": 30.0} for task in tasks}
    config = {"seed": 1, "method": "ds_lora", "log_dir": str(folder), **config}
    folder.mkdir(parents=True)
    summary = {"tasks": tasks, "matrix": cells, **metrics, "stages": stages, "config": config}
    summary["is_one_model"] = is_one_model
    (folder / "seq_summary.json").write_text(json.dumps(summary))
    rows = [
        {"stage": s, "eval_task": task, "branches": "latest", "loss": cells[t][i]}
        for t, s in enumerate(["base", *tasks])
        for i, task in enumerate(tasks)
        if cells[t][i] is not None
    ]
    rows += [
        {"stage": tasks[-1], "eval_task": task, "branches": name, "loss": loss}
        for name, loss in (readings or {}).items()
        for task in tasks
    ]
    (folder / "seq_eval_loss.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "seq_drift.jsonl").write_text("".join(json.dumps(r) + "\n" for r in drift))
    return str(folder)


def table_of(text: str) -> dict[str, list[str]]:
    """The cells of the first Markdown table in `text`, by row name."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows if len(row) == len(rows[0])} | {"header": rows[0]}


def test_compare_means_over_seeds_and_draws(tmp_path, capsys):
    better = [[5.0, 5.0, 5.0], [2.0, NAN, NAN], [1.5, 3.0, NAN], [1.7, 3.0, 1.0]]
    moved = [
        {"stage": "C", "probe_task": "A", "teacher": "A", "kl_first": 0.5, "kl_rest": 0.1},
        {"stage": "C", "probe_task": "B", "teacher": "B", "kl_first": 0.7, "kl_rest": None},
        {"stage": "C", "probe_task": "B", "teacher": "A", "kl_first": 9.0, "kl_rest": 9.0},
        {"stage": "B", "probe_task": "A", "teacher": "A", "kl_first": 9.0, "kl_rest": 9.0},
    ]
    runs = [
        write_run(tmp_path / "one,lr=3" / "seed1", LOSSES, moved, {"own": 2.0}),
        write_run(tmp_path / "one,lr=3" / "seed2", better, moved, {"own": 2.2}, seed=2),
        write_run(tmp_path / "other" / "seed1", better),
        write_run(tmp_path / "joint", [[5.0] * 3, [NAN] * 3, [NAN] * 3, [2.0, 2.0, 2.0]]),
    ]
    assert plot_loss.main(["compare", *runs, "--log_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    written = (tmp_path / "out" / "compare.md").read_text()
    assert written in printed
    rows = table_of(written)
    cells = dict(zip(rows["header"][1:], rows["one"], strict=True))
    assert cells["seeds"] == "2" and cells["training, min"] == "3.0"
    values = [forgetting(LOSSES), forgetting(better)]
    assert cells["forgetting ↓"] == f"{np.mean(values):+.3f} ± {np.std(values, ddof=1):.3f}"
    assert cells["just learned ↓"] == "2.000 ± 0.000"
    assert (
        cells["drift, first 5 ↓"] == "0.600 ± 0.000" and cells["drift, rest ↓"] == "0.100 ± 0.000"
    )
    alone = dict(zip(rows["header"][1:], rows["other"], strict=True))
    assert alone["forgetting ↓"] == f"{forgetting(better):+.3f}" and not alone["drift, rest ↓"]
    assert dict(zip(rows["header"][1:], rows["base"], strict=True))["final ↓"] == "5.000"
    assert not dict(zip(rows["header"][1:], rows["joint"], strict=True))["forgetting ↓"]
    assert "| one    | 2.067 ± 0.236 | 2.100 ± 0.141 |" in written
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "compare.md",
        "compare.pdf",
        "compare.png",
    }


def test_methods_of_several_seeds_need_not_share_their_readings(tmp_path, capsys):
    """A bank has `own` but no `slow`: its row is empty there, in the table and in the figure."""
    readings = {"ds_lora": {"own": 2.0, "slow": 3.0}, "bank": {"own": 2.0}}
    runs = [
        write_run(tmp_path / method / f"seed{seed}", LOSSES, (), readings[method], seed=seed)
        for method in readings
        for seed in (1, 2)
    ]
    assert plot_loss.main(["compare", *runs, "--log_dir", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    (bank,) = [row for row in rows if row[:2] == ["|", "bank"] and row[-2:] == ["|", "|"]]
    assert "2.000" in bank


def test_logs_from_before_there_were_readings_are_compared(tmp_path):
    run = Path(write_run(tmp_path / "old", LOSSES))
    log = run / "seq_eval_loss.jsonl"
    log.write_text(log.read_text().replace('"branches": "latest", ', ""))
    assert "branches" not in log.read_text()
    summary = json.loads((run / "seq_summary.json").read_text())
    del summary["is_one_model"]
    (run / "seq_summary.json").write_text(json.dumps(summary))
    assert plot_loss.main(["compare", str(run), "--log_dir", str(tmp_path)]) == 0


def test_what_cannot_be_compared_is_one_line(tmp_path, capsys):
    first = write_run(tmp_path / "one" / "seed1", LOSSES)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "seq_summary.json").write_text("{}")
    for other, message in (
        (str(tmp_path / "empty"), "is the run of that folder finished?"),
        (str(tmp_path / "broken"), "is no summary of a run"),
        (
            write_run(tmp_path / "one" / "seed2", LOSSES, seed=2, kd_lambda=3.0),
            "is not like",
        ),
        (write_run(tmp_path / "two", [[5.0, 5.0], [2.0, NAN], [2.0, 3.0]]), "differ in tasks"),
        (write_run(tmp_path / "three", [[4.0, 5.0, 5.0], *LOSSES[1:]]), "differ in tasks, base"),
        (write_run(tmp_path / "again" / "one" / "seed3", LOSSES), "have the same seed"),
    ):
        assert plot_loss.main(["compare", first, other, "--log_dir", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ") and message in line


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
    "argv", [[], ["what"], ["single"], ["seq", "T2_math"], ["seq", "--log", "x"], ["compare"]]
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


def test_a_bank_is_told_by_its_own_loras(tmp_path):
    run = write_run(tmp_path / "bank", LOSSES, (), {"own": 1.5}, is_one_model=False)
    assert plot_loss.main(["compare", run, "--log_dir", str(tmp_path)]) == 0
    text = (tmp_path / "compare.md").read_text()
    cells = dict(zip(*(table_of(text)[name] for name in ("header", "bank")), strict=False))
    assert "| bank   | 1     | 2.000          |              |" in text, cells
    assert "| bank   | 2.233  | 1.500 |" in text


def test_a_task_is_drawn_dotted_until_it_is_learned(tmp_path, monkeypatch):
    rows = [
        {"stage": stage, "eval_task": task, "branches": "latest", "loss": 1.0}
        for stage in ("base", "A", "B")
        for task in ("A", "B")
    ]
    (tmp_path / "seq_eval_loss.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    drawn = []
    monkeypatch.setattr(plot_loss, "save", lambda figure, path: drawn.append(figure) or path)
    assert plot_loss.main(["seq", "--log_dir", str(tmp_path)]) == 0
    lines = drawn[0].axes[0].get_lines()
    assert [(line.get_linestyle(), len(line.get_xdata())) for line in lines] == [
        (":", 2),
        ("-", 2),
        (":", 3),
        ("-", 1),
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


def test_scores_are_compared_where_they_are_there(tmp_path):
    def scored(folder, score, **config):
        run = write_run(folder, LOSSES, **config)
        line = {
            "task": "A",
            "metric": "exact",
            "branches": "own",
            "score": score,
            "low": 20,
            "high": 70,
        }
        (folder / "scores_C.jsonl").write_text(json.dumps(line) + "\n")
        return run

    runs = [scored(tmp_path / "one", 45.4), write_run(tmp_path / "none", LOSSES)]
    runs += [scored(tmp_path / "two" / f"seed{s}", 40 + s, seed=s) for s in (1, 3)]
    assert plot_loss.main(["compare", *runs, "--log_dir", str(tmp_path)]) == 0
    text = (tmp_path / "compare.md").read_text()
    assert (
        "| one    | own     | 45 [20, 70] |" in text
        and "| two    | own     | 42.0 ± 1.4  |" in text
    )
    assert "| none   | own" not in text


def drawn_single(tmp_path, monkeypatch, train, held_out):
    """The lines of the picture of a single run, from (epoch, step) of each log line and epochs."""
    rows = [{"epoch": e, "step": s, "loss": 3.0 - s / 1e6} for e, s in train]
    log = tmp_path / "single_T_train_loss.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"epoch": epoch, "loss": 3.0} for epoch in held_out]
    log = tmp_path / "single_T_eval_loss.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = []
    monkeypatch.setattr(plot_loss, "save", lambda figure, path: drawn.append(figure) or path)
    assert plot_loss.main(["single", "T", "--log_dir", str(tmp_path)]) == 0
    return drawn[0].axes[0]


@pytest.mark.parametrize(
    ("train", "ends"),
    [
        # Fewer steps than logging_steps; then with epochs that have no line.
        ([(1, 6)], [6]),
        ([(3, 6)], [2, 4, 6]),
        ([(2, 10), (3, 20), (3, 21)], [7, 14, 21]),
        ([(1, 10), (1, 20), (2, 30), (2, 40)], [20, 40]),
        # Ended by max_steps_per_task in the third epoch, and not finished.
        ([(e, s) for s in range(1, 18) for e in [-(-s // 7)]], [7, 14, 17]),
        ([(e, s) for s in range(1, 17) for e in [-(-s // 7)]][:-1], [7, 14]),
    ],
)
def test_held_out_points_stand_where_their_epoch_ended(tmp_path, monkeypatch, train, ends):
    axes = drawn_single(tmp_path, monkeypatch, train, range(1, len(ends) + 1))
    training, held_out = axes.get_lines()[0], axes.get_lines()[-1]
    assert list(held_out.get_xdata()) == ends and held_out.get_marker() == "o"
    assert list(training.get_xdata()) == [step for _, step in train]
    assert training.get_marker() == "."
    assert "LoRA" not in axes.get_title()


def test_a_long_log_is_drawn_in_seconds(tmp_path, monkeypatch):
    start = time.monotonic()
    train = [(1 + s // 1000, s + 1) for s in range(80_000)]
    axes = drawn_single(tmp_path, monkeypatch, train, range(1, 81))
    assert time.monotonic() - start < 10
    plain, smooth, held_out = axes.get_lines()
    assert plain.get_marker() == "" and list(held_out.get_xdata())[:2] == [1000, 2000]
    assert plot_loss.running_mean([1.0, 2.0, 4.0, 8.0], 2) == [1.0, 1.5, 3.0, 6.0]


def test_runs_of_two_virtual_environments_are_compared(tmp_path):
    places = [{"model_name": f"/{p}/m.gguf", "data_dir": f"/{p}/data"} for p in ("a", "b")]
    runs = [
        write_run(tmp_path / "one" / f"seed{s}", LOSSES, seed=s, **place)
        for s, place in enumerate(places)
    ]
    assert plot_loss.main(["compare", *runs, "--log_dir", str(tmp_path)]) == 0
