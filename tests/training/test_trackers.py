"""What is shown of a run elsewhere is what its logs say, also where it was interrupted."""

import json

import pytest
from accelerate import tracking
from helpers import die_in_a_pass, errors, read

import train_single_task
import train_slsd_seq
from training import trackers
from training.trackers import PROJECT, numbers_of

SHORT = {"task_order": ["T1_general", "T2_math"], "num_epochs": 2, "save_steps": 2}


def interrupted(argv, monkeypatch):
    """The script's exit code after a run that died half-way and the same command again."""
    die_in_a_pass(monkeypatch, 12, argv)
    return train_slsd_seq.main(argv)


def shown(logs) -> dict:
    """(name, step) -> number, of all that the logs say of losses."""
    found, before, at, stage = {}, 0, 0, ""
    lines = [("seq_train_loss", row) for row in read(logs / "seq_train_loss.jsonl")]
    evaluated = {}
    for kind, row in lines:
        if row["stage"] != stage:
            before, stage = before + at, row["stage"]
        at = row["step"]
        evaluated[stage] = before + at
        found |= {(name, before + at): value for name, value in numbers_of(kind, row).items()}
    for row in read(logs / "seq_eval_loss.jsonl"):
        name = f"seq_eval_loss/{row['eval_task']}/{row['branches']}/loss"
        found[name, evaluated.get(row["stage"], 0)] = row["loss"]
    return found


def test_the_numbers_of_a_line_are_named_by_its_texts():
    row = {"stage": "T2_math", "eval_task": "T1_general", "branches": "own", "loss": 1.5}
    assert numbers_of("seq_eval_loss", {**row, "tokens": 7, "kd_loss": None}) == {
        "seq_eval_loss/T1_general/own/loss": 1.5
    }
    assert numbers_of("seq_samples", {"stage": "a", "task": "b", "number": 0, "reply": "c"}) == {}


@pytest.mark.parametrize("script", [train_slsd_seq, train_single_task])
def test_what_is_not_installed_is_a_line_at_the_start(script, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    task = ["--task", "T2_math"] if script is train_single_task else []
    assert script.main([*task, *flags(report_to="wandb")]) == 2
    assert errors(capsys) == [
        "error: --report_to wandb: it is not installed; `pip install wandb`, or leave it out"
    ]
    assert script.main([*task, *flags(report_to=["none", "mlflow"])]) == 2
    assert "give some of tensorboard, trackio, wandb, or none" in errors(capsys)[0]
    assert not list(tmp_path.rglob("*.jsonl"))


class Recorder:
    """In the place of one of accelerate's trackers."""

    name = "wandb"
    made: list = []

    def __init__(self, project, **options):
        self.project, self.options, self.lines, self.images = project, options, [], {}
        self.config, self.is_open = None, False
        Recorder.made.append(self)

    def start(self):
        self.is_open = True

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step):
        assert self.is_open
        self.lines.append((step, values))

    def log_images(self, values, step):
        self.images |= values

    def finish(self):
        self.is_open = False


def test_a_resumed_run_goes_on_with_the_same_one(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(Recorder, "made", [])
    monkeypatch.setattr(tracking, "WandBTracker", Recorder)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert interrupted(flags(report_to="wandb", **SHORT), monkeypatch) == 0
    first, second = Recorder.made
    assert first.project == PROJECT and first.options == second.options
    assert first.options["mode"] == "offline" and first.options["resume"] == "allow"
    assert first.config["seed"] == 42 and json.loads(first.config["task_order"])
    assert second.config == first.config and not first.is_open and not second.is_open
    assert list(second.images) == ["seq_eval_loss"]
    (image,) = second.images["seq_eval_loss"]
    assert image.shape[-1] == 3 and image.dtype.name == "uint8"
    said = {
        (name, step): v for t in (first, second) for step, of in t.lines for name, v in of.items()
    }
    expected = shown(tmp_path / "logs")
    assert len(expected) > 20
    assert {key: said[key] for key in expected} == expected
    # Of each process they only grow: W&B drops what is behind.
    for tracker in Recorder.made:
        steps = [step for step, _ in tracker.lines]
        assert steps == sorted(steps) and steps


def test_tensorboard_holds_what_the_logs_say(flags, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert interrupted(flags(report_to=["tensorboard"], **SHORT), monkeypatch) == 0
    events = EventAccumulator(str(tmp_path / "logs" / "seq_tensorboard"), {"scalars": 0})
    events.Reload()
    expected = shown(tmp_path / "logs")
    said = {
        (name, event.step): event.value
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    }
    assert {key: said[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    # None twice, though a part was trained twice.
    for name in {name for name, _ in expected}:
        steps = [event.step for event in events.Scalars(name)]
        assert len(steps) == len(set(steps)), name
    assert events.Tags()["images"] == ["seq_eval_loss"]
    argv = flags(report_to=["tensorboard"], overwrite=True, **SHORT)
    assert train_slsd_seq.main(argv) == 0
    assert len(list((tmp_path / "logs" / "seq_tensorboard").glob("events.*"))) == 1


def test_trackio_holds_what_the_logs_say(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    assert interrupted(flags(report_to="trackio", **SHORT), monkeypatch) == 0
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = trackio.Api().runs(PROJECT)
    assert run.config["seed"] == 42
    logs = SQLiteStorage.get_logs(PROJECT, run_id=run.id)
    said = {(name, row["step"]): value for row in logs for name, value in row.items()}
    expected = shown(tmp_path / "logs")
    assert {key: said[key] for key in expected} == pytest.approx(expected)
    assert any(name == "seq_eval_loss" for name, _ in said)
