"""Many runs and their evaluation, killed at any write, rename or log line: nothing is lost."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, Killed, fail_at, outcome

import evaluate_tasks
import run_experiments
import train_slsd_seq
from training import logs, saving

# Where a death is tried: (module or class, function).
PLACES = [
    (saving.os, "fsync"),
    (saving.os, "replace"),
    (saving.os, "rename"),
    (saving.os, "unlink"),
    (saving.shutil, "rmtree"),
    (logs.JsonlLog, "write"),
]
# A comparison tells how long the runs took.
CLOCKS = ("compare.md", "compare.pdf", "compare.png")


@pytest.fixture
def commands(flags, tmp_path):
    """Name -> [(main, argv), ...]: two methods, and the questions to a stage of one of them."""

    def build(name):
        logs, checkpoints = tmp_path / name / "logs", tmp_path / name / "checkpoints"
        short = {"task_order": ["T1_general", "T2_math"], "max_steps_per_task": 2, "save_steps": 1}
        short |= {"max_train_samples": 8, "eval_samples_per_task": 2, "log_dir": logs}
        argv = flags(**short, save_dir=checkpoints)
        checkpoint = checkpoints / "slsd@12" / "seed42" / "seq_T2_math"
        more = ["--max_new_tokens", "2", "--checkpoint", str(checkpoint)]
        return [
            (run_experiments.main, [*argv, "--methods", "seq_lora", "slsd"]),
            (evaluate_tasks.main, [*argv, *more]),
        ]

    return build


@pytest.fixture
def in_process(monkeypatch):
    """The runs are not processes of their own: importing takes longer than they do."""

    def run_here(commands, _):
        return {of.name: train_slsd_seq.main(of.argv[2:]) for of in commands}, 0

    monkeypatch.setattr(run_experiments, "run_side_by_side", run_here)


def left_by(folder):
    # It may be removed at any time.
    shutil.rmtree(folder / "checkpoints" / ".prefix_store", ignore_errors=True)
    return {name: value for name, value in outcome(folder).items() if not name.endswith(CLOCKS)}


def test_kill_points_over_experiments_and_evaluations(
    commands, tmp_path, monkeypatch, in_process, request
):
    """`--faults N` tries N of them."""
    for main, argv in commands("whole"):
        assert main(argv) == 0
    expected, draw = left_by(tmp_path / "whole"), random.Random(0)
    wanted, kills, runs = request.config.getoption("--faults"), 0, 0
    while kills < wanted:
        for main, argv in commands("cut"):
            while True:
                with monkeypatch.context() as patch:
                    if kills < wanted:
                        fail_at(patch, *draw.choice(PLACES), int(1.07 ** draw.randrange(75)) - 1)
                    try:
                        assert main(argv) == 0
                        break
                    except Killed:
                        kills += 1
        assert left_by(tmp_path / "cut") == expected
        shutil.rmtree(tmp_path / "cut")
        runs += 1
    print(f"{kills} kills, {runs} runs, 0 differences")


def test_kill_minus_nine_of_experiments(commands, tmp_path, in_process, request):
    """The real processes, the run and what started it; `--faults N` kills them N / 5 times."""
    kills = request.config.getoption("--faults") // 5
    if not kills:
        pytest.skip("with --faults 5 or more: each takes ten seconds")
    (main, argv), _ = commands("whole")
    assert main(argv) == 0
    (_, argv), _ = commands("cut")
    script = [sys.executable, ROOT / "run_experiments.py", *map(str, argv)]
    moment = random.Random(0)
    for _ in range(kills):
        process = subprocess.Popen(
            script, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        time.sleep(moment.uniform(5, 15))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert main(argv) == 0
    assert left_by(tmp_path / "cut") == left_by(tmp_path / "whole")
