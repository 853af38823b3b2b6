"""Two processes on one machine, by the real command line: the same results as one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, errors, outcome
from safetensors.torch import load_file

import train_slsd_seq
from configs.command_line import UserError
from training.device import select_device

TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# 21 samples in steps of 4: in the last one of each epoch the second process has none.
HARD = {"lora_dropout": 0.0, "task_order": ["T1_general", "T2_math"], "max_train_samples": 21}
HARD |= {"num_epochs": 2, "save_steps": 3, "tokens_per_pass": 64}


@pytest.fixture
def argv(flags, tmp_path):
    """Command line of a run in a folder of its own; `processes` share a step's four samples."""

    def build(name, processes, **changes):
        here = {"log_dir": tmp_path / name / "logs", "save_dir": tmp_path / name / "checkpoints"}
        share = {"per_device_batch_size": 1, "gradient_accumulation_steps": 4 // processes}
        return flags(**{**HARD, **share, **here, **changes})

    return build


def start(argv, script=ROOT / "train_slsd_seq.py"):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*TWO, script, *argv],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(run):
    out, err = run.communicate(timeout=120)
    return run.returncode, out, err


def wait_for_state(folder: Path, number: int, run) -> None:
    """Until the state `number` is there."""
    deadline = time.monotonic() + 90
    while not list(folder.glob(f"checkpoints/seq_state/state-{number:08d}-*")):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def workers(run) -> list[int]:
    """Process ids of torchrun's children, by rank."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    rank = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        for entry in environment:
            if entry.startswith(b"RANK="):
                rank[int(entry[5:])] = int(child)
    return [rank[i] for i in sorted(rank)]


# A thread of the process group that outlives it can abort the process as it ends.
LEAVES_NO_THREADS = """
import sys
from pathlib import Path
import train_slsd_seq
code = train_slsd_seq.main()
names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
sys.exit(code or (f"left: {names}" if any("gloo" in name for name in names) else 0))
"""


PLUS = {"method": "slsd_plus", "consolidate": "gram", "anchor_lambda": 0.0, "memory_per_task": 3}


@pytest.mark.parametrize("settings", [{}, PLUS], ids=["slsd", "slsd_plus, consolidated"])
def test_two_processes_give_the_results_of_one(settings, argv, tmp_path, monkeypatch):
    assert train_slsd_seq.main(argv("one", 1, **settings)) == 0
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = tmp_path / "script.py"
    script.write_text(LEAVES_NO_THREADS)
    code, out, err = finished(start(argv("two", 2, **settings), script))
    assert code == 0, err
    assert out.count("average final loss") == 1
    one, two = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in ("logs/seq_train_loss.jsonl", "logs/seq_eval_loss.jsonl"):
        for ours, expected in zip(two[name], one[name], strict=True):
            for key, value in expected.items():
                is_float = isinstance(value, float)
                assert ours[key] == (
                    pytest.approx(value, rel=1e-5, abs=1e-6) if is_float else value
                )
    for task in HARD["task_order"]:
        file = f"checkpoints/seq_{task}/adapter_model.safetensors"
        first, second = (load_file(tmp_path / run / file) for run in ("one", "two"))
        for name, tensor in first.items():
            assert (tensor - second[name]).norm() <= 1e-4 * tensor.norm(), name


def test_a_killed_process_ends_all_and_the_run_goes_on_as_if_nothing_had_happened(
    argv, tmp_path, capsys
):
    # Five samples: one process reads three of them, the other two.
    dropout = {"lora_dropout": 0.1, "max_train_samples": 5, "max_steps_per_task": 6}
    assert finished(start(argv("whole", 2, **dropout)))[0] == 0
    command = argv("cut", 2, **dropout)
    run = start(command)
    wait_for_state(tmp_path / "cut", 2, run)
    os.kill(workers(run)[1], signal.SIGKILL)
    code, _, err = finished(run)
    assert code != 0 and f'File "{ROOT}' not in err
    # One process alone is another run.
    assert train_slsd_seq.main(command) == 2
    assert "processes 2 -> 1" in errors(capsys)[0]
    # A signal to one process stops both at the end of the step, and saves.
    run = start(command)
    wait_for_state(tmp_path / "cut", 4, run)
    os.kill(workers(run)[1], signal.SIGTERM)
    code, out, err = finished(run)
    assert code != 0 and "going on from" in out
    assert "the same command goes on" in err
    code, out, err = finished(start(command))
    assert code == 0 and "going on from" in out, err
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_mistake_is_told_once(argv):
    code, out, err = finished(start(argv("none", 2, model_name="nowhere/at-all")))
    assert code != 0
    # torchrun's own report of a failed process holds a traceback of torchrun.
    assert err.count("error: --model_name nowhere/at-all") == 1 and f'File "{ROOT}' not in err


def test_two_processes_share_gpus_one_each(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert select_device("auto") == torch.device("cpu")
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select_device("auto") == select_device("cuda") == torch.device("cuda", 1) == chosen[0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for wanted, fault in (("auto", "2 processes for 1 GPUs"), ("cuda:0", "give auto, cuda or cpu")):
        with pytest.raises(UserError, match=fault):
            select_device(wanted)
