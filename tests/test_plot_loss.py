"""The loss curves of a run, and what is said where they cannot be drawn."""

import json
import time

import pytest

import plot_loss


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing: run python train_slsd_seq.py first"),
        ("", "is empty"),
        ('{"stage": "base"', "line 1 is no JSON"),
        ('{"stage": "base", "loss": 1}', "line 1: 'eval_task' is missing"),
        ("3", "line 1 is no object"),
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


@pytest.mark.parametrize("number", [5, 80, 3000])
def test_of_very_many_names_only_some_stand_at_an_axis(number):
    names = [f"s{i}" for i in range(number)]
    _, axes = plot_loss.plt.subplots()
    plot_loss.write_names(axes.set_xticks, names)
    written = {tick.get_position()[0]: tick.get_text() for tick in axes.get_xticklabels()}
    plot_loss.plt.close("all")
    assert all(text == names[place] for place, text in written.items())
    assert len(written) == number if number < 80 else 30 < len(written) <= 80
