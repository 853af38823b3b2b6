"""A run outlives kills, signals and damaged files, and ends as if nothing had happened."""

import contextlib
import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, Killed, contents, die_in_a_pass, errors, fail_at, outcome
from safetensors.torch import load_file

import evaluate_tasks
import train_single_task
import train_slsd_seq
from configs.command_line import Stopped, UserError
from methods import folding, memory, parse_config, slsd
from models import consolidation
from models.reading import read_json
from training import outputs, plan, saving
from training import passes as passes_module
from training.logs import JsonlLog
from training.loop import TaskTraining
from training.saving import RunState, run_lock

# Dropout on, KD on, several passes a step and a partial last step in each task; a state falls
# between two log lines.
HARD = {"lora_dropout": 0.1, "tokens_per_pass": 64, "logging_steps": 2, "save_steps": 1}
HARD |= {"num_epochs": 2, "per_device_batch_size": 1}


@pytest.fixture
def seq_flags(flags, tmp_path):
    """Command line of a hard run in a folder of its own."""

    def build(name, **changes):
        here = {"log_dir": tmp_path / name / "logs", "save_dir": tmp_path / name / "checkpoints"}
        tasks = {"task_order": ["T1_general", "T2_math", "T3_code"]}
        return flags(**{**HARD, **tasks, **here, **changes})

    return build


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def uninterrupted(seq_flags, whole):
    """What the hard run leaves; it is run once for all tests."""
    here = {"log_dir": whole / "logs", "save_dir": whole / "checkpoints"}
    if not here["log_dir"].exists():
        assert train_slsd_seq.main(seq_flags("whole", **here)) == 0
    return outcome(whole)


def kill_and_resume(argv, number, monkeypatch):
    """Dies at the `number`-th write, then runs to the end; False where there are fewer writes."""
    with monkeypatch.context() as patch:
        fail_at(patch, saving.os, "fsync", number)
        try:
            assert train_slsd_seq.main(argv) == 0
            return False
        except Killed:
            pass
    assert train_slsd_seq.main(argv) == 0
    return True


@pytest.mark.parametrize("number", [0, 3, 20, 62, 125, 200])
def test_a_run_that_dies_at_a_write_and_goes_on_is_the_uninterrupted_one(
    seq_flags, uninterrupted, tmp_path, monkeypatch, number
):
    assert kill_and_resume(seq_flags("cut"), number, monkeypatch)
    assert outcome(tmp_path / "cut") == uninterrupted


@pytest.mark.parametrize("number", [0, 4, 17, 33, 50])
def test_a_run_that_dies_in_a_forward_pass_goes_on_as_well(
    seq_flags, uninterrupted, tmp_path, monkeypatch, number
):
    die_in_a_pass(monkeypatch, number, seq_flags("cut"))
    assert train_slsd_seq.main(seq_flags("cut")) == 0
    assert outcome(tmp_path / "cut") == uninterrupted


def test_a_single_task_goes_on(flags, tmp_path, monkeypatch):
    def argv(name):
        here = {"log_dir": tmp_path / name / "logs", "save_dir": tmp_path / name / "checkpoints"}
        return ["--task", "T2_math", *flags(**HARD, **here)]

    assert train_single_task.main(argv("whole")) == 0
    die_in_a_pass(monkeypatch, 6, argv("cut"), train_single_task)
    assert train_single_task.main(argv("cut")) == 0
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_fields_that_do_not_change_results_may_change(
    seq_flags, uninterrupted, tmp_path, monkeypatch
):
    die_in_a_pass(monkeypatch, 30, seq_flags("cut"))
    # What the base was held as is told at last: "auto" is another dtype on another device.
    assert train_slsd_seq.main(seq_flags("cut", save_steps=7, dtype="float32")) == 0
    cut = outcome(tmp_path / "cut")
    for name, value in uninterrupted.items():
        assert name.endswith(("summary.json", "config.yaml")) or cut[name] == value


def test_other_data_another_base_and_another_config_are_refused(
    seq_flags, tmp_path, monkeypatch, capsys, data_folder, model_folder
):
    die_in_a_pass(monkeypatch, 30, seq_flags("cut"))
    before = contents(tmp_path / "cut")
    data, model = tmp_path / "data", tmp_path / "model"
    shutil.copytree(data_folder, data)
    with open(data / "T2_math.jsonl", "a") as file:
        file.write('{"instruction": "new", "input": "", "output": "row"}\n')
    shutil.copytree(model_folder, model)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    changed = {"config.json": ('"silu"', '"gelu"'), "tokenizer.json": ('"version"', ' "version"')}
    for file, (old, new) in changed.items():
        shutil.copytree(model_folder, tmp_path / file)
        path = tmp_path / file / file
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    for change, named in (
        ({"data_dir": data}, "another data of T2_math"),
        ({"model_name": model}, "another weights)"),
        ({"model_name": tmp_path / "config.json"}, "another config.json)"),
        ({"model_name": tmp_path / "tokenizer.json"}, "another tokenizer)"),
        ({"kd_lambda": 0.5}, "kd_lambda 1.0 -> 0.5"),
        ({"dtype": "bfloat16"}, "dtype float32 -> bfloat16"),
    ):
        capsys.readouterr()
        assert train_slsd_seq.main(seq_flags("cut", **change)) == 2
        (line,) = errors(capsys)
        assert named in line and "--overwrite true" in line
        assert contents(tmp_path / "cut") == before


def test_the_same_base_by_another_path_is_the_same_run(
    seq_flags, uninterrupted, tmp_path, monkeypatch, model_folder
):
    die_in_a_pass(monkeypatch, 30, seq_flags("cut"))
    (tmp_path / "link").symlink_to(model_folder)
    assert train_slsd_seq.main(seq_flags("cut", model_name=f"{tmp_path}/./link/")) == 0
    logs = [name for name in uninterrupted if name.endswith(".jsonl")]
    assert logs and all(outcome(tmp_path / "cut")[name] == uninterrupted[name] for name in logs)
    # And so is the base of its checkpoints.
    argv = ["--checkpoint", str(tmp_path / "cut" / "checkpoints" / "seq_T2_math")]
    argv += ["--task_order", "T2_math", "--max_samples", "1", "--max_new_tokens", "1"]
    assert evaluate_tasks.main([*seq_flags("cut"), *argv]) == 0


def test_a_death_while_overwriting_never_leaves_a_finished_run_without_its_logs(
    seq_flags, tmp_path, monkeypatch, capsys
):
    argv = seq_flags("cut", task_order=["T2_math"], max_steps_per_task=1)
    assert train_slsd_seq.main(argv) == 0
    shutil.copytree(tmp_path / "cut", tmp_path / "whole")
    (cfg,) = parse_config(list(map(str, argv)), description="")
    for number in range(1, 100):
        with monkeypatch.context() as patch:
            removed = fail_at(patch, saving.os, "unlink", number)
            with contextlib.suppress(Killed):
                outputs.clear_outputs(cfg, "seq")
        if len(removed) <= number:
            break
        # For `run_experiments.py` too.
        assert not outputs.summary_path(cfg).exists()
        capsys.readouterr()
        assert train_slsd_seq.main(argv) == 2
        assert "--overwrite true" in errors(capsys)[-1]
        shutil.rmtree(tmp_path / "cut")
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    assert number > 5 and not list((tmp_path / "cut").glob("*/seq*/*"))


def test_a_finished_run_that_lost_a_log_is_not_called_finished(seq_flags, tmp_path, capsys):
    argv = seq_flags("cut", task_order=["T2_math"], max_steps_per_task=1)
    assert train_slsd_seq.main(argv) == 0
    for name in ("seq_summary.json", "seq_eval_loss.jsonl"):
        path = tmp_path / "cut" / "logs" / name
        kept = path.read_bytes()
        path.unlink()
        capsys.readouterr()
        assert train_slsd_seq.main(argv) == 2
        assert f"{name} is missing: put it back" in errors(capsys)[0]
        path.write_bytes(kept)
    assert train_slsd_seq.main(argv) == 0


@pytest.mark.parametrize("folder", ["logs", "checkpoints"])
def test_a_folder_that_vanishes_is_one_line(seq_flags, tmp_path, monkeypatch, capsys, folder):
    original, calls = passes_module.make_passes, []

    def vanishing(*args):
        calls.append(1)
        if len(calls) == 25:
            shutil.rmtree(tmp_path / "cut" / folder)
        return original(*args)

    monkeypatch.setattr(passes_module, "make_passes", vanishing)
    assert train_slsd_seq.main(seq_flags("cut")) == 2
    (line,) = errors(capsys)
    assert f"cut/{folder}/.seq.lock was removed" in line


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EINVAL, errno.EFBIG])
def test_a_failing_disk_is_one_line(seq_flags, tmp_path, monkeypatch, capsys, number):
    with monkeypatch.context() as patch:
        fail_at(patch, saving.os, "fsync", 40, OSError(number, os.strerror(number)))
        assert train_slsd_seq.main(seq_flags("cut")) == 2
    (line,) = errors(capsys)
    assert os.strerror(number) in line and "the last saved state is whole" in line
    assert RunState(tmp_path / "cut" / "checkpoints" / "seq_state").load()


def damage_newest(state: Path, how: str) -> Path:
    newest = sorted(state.glob("state-*"))[-1]
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        if how == "truncated":
            file.write_bytes(whole[: len(whole) // 2])
        elif how == "flipped":
            middle = len(whole) // 2
            file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        else:
            file.unlink()
        return newest
    raise AssertionError("an empty state")


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_a_damaged_state_is_named_and_the_one_before_it_used(
    seq_flags, uninterrupted, tmp_path, monkeypatch, capsys, how
):
    die_in_a_pass(monkeypatch, 30, seq_flags("cut"))
    newest = damage_newest(tmp_path / "cut" / "checkpoints" / "seq_state", how)
    assert train_slsd_seq.main(seq_flags("cut")) == 0
    assert f"{newest.name} is damaged" in capsys.readouterr().err
    assert outcome(tmp_path / "cut") == uninterrupted


def test_no_whole_state_is_an_error_and_never_a_fresh_start(
    seq_flags, tmp_path, monkeypatch, capsys
):
    die_in_a_pass(monkeypatch, 30, seq_flags("cut"))
    for state in (tmp_path / "cut" / "checkpoints" / "seq_state").glob("state-*"):
        (state / "manifest.json").write_text("{}")
    before = contents(tmp_path / "cut")
    capsys.readouterr()
    assert train_slsd_seq.main(seq_flags("cut")) == 2
    assert "none of 2 saved states is whole" in capsys.readouterr().err
    assert contents(tmp_path / "cut") == before


def test_every_byte_of_a_state_is_guarded(tmp_path):
    state = RunState(tmp_path)
    state.save({"position": 1}, {"branches": {"a": torch.arange(6.0)}})
    (folder,) = state.found()
    for file in folder.iterdir():
        whole = file.read_bytes()
        for i in range(len(whole)):
            file.write_bytes(whole[:i] + bytes([whole[i] ^ 0x10]) + whole[i + 1 :])
            with pytest.raises((ValueError, KeyError)):
                RunState._read(folder)
        for i in range(0, len(whole), 7):
            file.write_bytes(whole[:i])
            with pytest.raises((ValueError, KeyError)):
                RunState._read(folder)
        file.write_bytes(whole)
    facts, parts = state.load()
    assert facts == {"position": 1} and torch.equal(parts["branches"]["a"], torch.arange(6.0))


@pytest.mark.parametrize("what", ["a file is synced", "a log line is written"])
def test_a_full_disk_is_one_line_and_leaves_a_whole_state(
    seq_flags, tmp_path, monkeypatch, capsys, request, what
):
    """At every 20th write of a short run, with `--faults 50` at every single one."""
    short = {"task_order": ["T1_general", "T2_math"], "num_epochs": 1, "max_steps_per_task": 2}
    assert train_slsd_seq.main(seq_flags("whole", **short)) == 0
    expected, full = outcome(tmp_path / "whole"), OSError(28, "No space left on device")
    synced = what == "a file is synced"
    target = (saving.os, "fsync") if synced else (JsonlLog, "write")
    every = 1 if request.config.getoption("--faults") >= 50 else 20
    for number in range(0, 10_000, every):
        with monkeypatch.context() as patch:
            fail_at(patch, *target, number, full)
            code = train_slsd_seq.main(seq_flags("cut", **short))
        if code == 0:
            break
        assert code == 2 and "No space left on device" in capsys.readouterr().err
        assert train_slsd_seq.main(seq_flags("cut", **short)) == 0
        assert outcome(tmp_path / "cut") == expected
        shutil.rmtree(tmp_path / "cut")
    print(f"{number} faults, 0 differences")
    assert number >= (40 if synced else every)


def test_too_little_space_and_a_read_only_folder_are_found_before_training(
    seq_flags, tmp_path, monkeypatch, capsys
):
    usage = shutil._ntuple_diskusage(100, 99, 1)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage)
    assert train_slsd_seq.main(seq_flags("cut")) == 2
    assert "make room" in errors(capsys)[0]
    (tmp_path / "file").write_text("")
    assert train_slsd_seq.main(seq_flags("cut", save_dir=tmp_path / "file" / "x")) == 2
    assert "cannot be written" in errors(capsys)[0]


def test_one_run_a_folder(seq_flags, tmp_path, capsys):
    here = str(tmp_path / "cut" / "logs")
    with run_lock([here], "seq"):
        assert train_slsd_seq.main(seq_flags("cut")) == 2
    (line,) = errors(capsys)
    assert "another run is at work there" in line
    with run_lock([here], "seq"), run_lock([here], "single_T2_math"):
        pass


def test_of_two_runs_that_race_one_is_refused(seq_flags, uninterrupted, tmp_path):
    argv = [sys.executable, "train_slsd_seq.py", *map(str, seq_flags("cut"))]
    runs = [
        subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = {run.communicate(timeout=120)[1]: run.returncode for run in runs}
    assert sorted(said.values()) == [0, 2]
    (refused,) = (text for text, code in said.items() if code == 2)
    assert refused.startswith("error: ") and "another run is at work there" in refused
    assert outcome(tmp_path / "cut") == uninterrupted


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_saves_and_the_same_command_goes_on(
    seq_flags, uninterrupted, tmp_path, monkeypatch, capsys, number, code
):
    original, calls = passes_module.make_passes, []

    def signalling(*args):
        calls.append(1)
        if len(calls) == 25:
            os.kill(os.getpid(), number)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(passes_module, "make_passes", signalling)
        assert train_slsd_seq.main(seq_flags("cut", save_steps=1000)) == code
    assert "the same command goes on" in capsys.readouterr().err
    assert train_slsd_seq.main(seq_flags("cut", save_steps=1000)) == 0
    cut = outcome(tmp_path / "cut")
    for name, value in uninterrupted.items():
        assert name.endswith(("summary.json", "config.yaml")) or cut[name] == value


CPU_IS_FULL = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU_IS_FULL + "memory")]
)
def test_out_of_memory_halves_the_passes_and_repeats_the_step(
    seq_flags, tmp_path, monkeypatch, capsys, error
):
    original = passes_module.make_passes

    def limited(samples, tokens_per_pass, *rest):
        for indices, batch, targets in original(samples, tokens_per_pass, *rest):
            yield indices, batch, targets
            if batch["input_ids"].numel() > 60 and len(indices) > 1:
                raise error

    monkeypatch.setattr(passes_module, "make_passes", limited)
    changes = {"lora_dropout": 0.0, "task_order": ["T2_math"], "prefix_cache_gib": 0.0}
    assert train_slsd_seq.main(seq_flags("small", **changes, tokens_per_pass=200)) == 0
    printed = capsys.readouterr().out
    assert "going on with --tokens_per_pass 100" in printed
    assert "going on with --tokens_per_pass 50" in printed
    assert train_slsd_seq.main(seq_flags("direct", **changes, tokens_per_pass=50)) == 0
    name = "logs/seq_train_loss.jsonl"
    # The first steps may have fitted: their passes were other ones.
    small, direct = (
        [line["loss"] for line in outcome(tmp_path / n)[name]] for n in ("small", "direct")
    )
    assert small == pytest.approx(direct, rel=1e-5)
    assert "1/4 of the tokens a pass" in printed


@pytest.mark.parametrize(
    ("settings", "failures"),
    [
        ({"method": "slsd_plus", "memory_per_task": 4}, ["read_answers"]),
        (
            {
                **{"method": "slsd_plus", "anchor_lambda": 0, "memory_per_task": 4},
                "consolidate": "gram",
            },
            ["gram_matrices", "read_answers", "gated"],
        ),
        (
            {"kd_probes": "replay", "kd_branches": "all", "consolidate": "gram"},
            ["gram_matrices", "read_answers", "gated"],
        ),
    ],
)
def test_out_of_memory_between_two_tasks_changes_nothing_twice(
    seq_flags, tmp_path, monkeypatch, settings, failures
):
    """Each reading is done again where it fails at its very end, and so is the fold half way."""
    settings = {"lora_dropout": 0.0, "tokens_per_pass": 512, **settings}
    assert train_slsd_seq.main(seq_flags("plain", **settings)) == 0
    failed = []

    def fails_at_first(owner, name, calls=1):
        original = getattr(owner, name)
        left = itertools.chain([False] * (calls - 1), [True], itertools.repeat(False))

        def failing(*args):
            result = original(*args)
            if next(left):
                failed.append(name)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return result

        monkeypatch.setattr(owner, name, failing)

    for owner in (memory, slsd):
        fails_at_first(owner, "read_answers")
    fails_at_first(folding, "gram_matrices")
    fails_at_first(consolidation, "gated", calls=2)
    assert train_slsd_seq.main(seq_flags("tight", **settings)) == 0
    assert failed == failures
    adapter = "checkpoints/seq_T3_code/adapter_model.safetensors"
    plain, tight = (load_file(tmp_path / name / adapter) for name in ("plain", "tight"))
    for name, tensor in plain.items():
        torch.testing.assert_close(tight[name], tensor, atol=1e-5, rtol=1e-3)
    plain, tight = (
        read_json(tmp_path / name / "logs/seq_summary.json")["stages"]
        for name in ("plain", "tight")
    )
    for stage, of_stage in plain.items():
        assert tight[stage]["samples_kept"] == of_stage["samples_kept"]
        assert tight[stage]["bytes_kept"] == of_stage["bytes_kept"]


def test_a_signal_while_an_epoch_is_evaluated_costs_no_step(seq_flags, tmp_path, monkeypatch):
    argv = ["--task", "T2_math", *seq_flags("cut", save_steps=1000)]
    assert train_single_task.main([*argv[:2], *seq_flags("plain", save_steps=1000)]) == 0
    evaluate, step = train_single_task.evaluate_loss, TaskTraining._step
    # The base, then the first epoch.
    stops, steps = iter([False, True]), []

    def stopped(*args):
        if next(stops, False):
            raise Stopped(signal.SIGTERM)
        return evaluate(*args)

    monkeypatch.setattr(train_single_task, "evaluate_loss", stopped)
    assert train_single_task.main(argv) == 128 + signal.SIGTERM
    monkeypatch.setattr(
        TaskTraining, "_step", lambda self, n, *args: steps.append(n) or step(self, n, *args)
    )
    assert train_single_task.main(argv) == 0
    assert steps == list(range(6, 12))
    plain, cut = outcome(tmp_path / "plain"), outcome(tmp_path / "cut")
    for name, value in plain.items():
        assert name.endswith("config.yaml") or cut[name] == value


def test_one_sample_that_is_too_much_is_an_error_with_its_cures(seq_flags, monkeypatch, capsys):
    def failing(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    monkeypatch.setattr(passes_module, "make_passes", failing)
    assert train_slsd_seq.main(seq_flags("cut", prefix_cache_gib=0.0)) == 2
    assert "--max_seq_len" in errors(capsys)[0]


@pytest.mark.parametrize("script", [train_slsd_seq, train_single_task])
def test_a_dry_run_tells_and_writes_nothing(script, seq_flags, tmp_path, capsys):
    argv = ["--task", "T2_math"] if script is train_single_task else []
    assert script.main([*argv, *seq_flags("dry"), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "T2_math: 24 samples to train on, 6 held out" in printed
    assert "T2_math: 12 optimizer steps" in printed
    assert "1,792 trainable parameters, 51,488 frozen" in printed
    assert "GiB of cpu memory" in printed and "MiB of disk" in printed
    assert "training takes" in printed and "(measured)" in printed
    assert not contents(tmp_path / "dry")


def test_a_dry_run_tells_what_would_be_resumed(seq_flags, tmp_path, monkeypatch, capsys):
    die_in_a_pass(monkeypatch, 30, seq_flags("cut"))
    before = contents(tmp_path / "cut")
    assert train_slsd_seq.main(seq_flags("cut", dry_run=True)) == 0
    assert "a saved state would be resumed" in capsys.readouterr().out
    assert contents(tmp_path / "cut") == before


def test_a_log_that_lost_or_changed_lines_is_an_error(tmp_path):
    path = tmp_path / "log.jsonl"
    with JsonlLog(path) as log:
        log.write(loss=1.0)
        log.write(loss=2.0)
        written = log.written()
        log.write(loss=3.0)
    JsonlLog(path, written).close()
    whole = path.read_text()
    assert whole == '{"loss": 1.0}\n{"loss": 2.0}\n'
    path.write_text(whole.replace("2.0", "4.0"))
    with pytest.raises(UserError, match="is not what this run has written"):
        JsonlLog(path, written)
    path.write_text("{}\n")
    with pytest.raises(UserError, match="has 3 bytes.*counts on 28"):
        JsonlLog(path, written)


def test_kill_minus_nine_at_random_moments(seq_flags, uninterrupted, tmp_path, request):
    """The real command line; `--faults N` kills it N times and more."""
    argv = [sys.executable, "train_slsd_seq.py", *map(str, seq_flags("cut"))]
    wanted, kills, moment = request.config.getoption("--faults"), 0, random.Random(0)
    runs = 0
    while True:
        process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        # Past the imports, where there is nothing to lose.
        time.sleep(moment.uniform(1.5, 6.0) if kills < wanted else 0)
        if kills < wanted and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err.decode()
        assert outcome(tmp_path / "cut") == uninterrupted
        runs += 1
        if kills >= wanted:
            break
        shutil.rmtree(tmp_path / "cut")
    print(f"{kills} kills, {runs} runs, 0 differences")


def test_states_are_kept_two_deep(tmp_path):
    state = RunState(tmp_path)
    for i in range(4):
        state.save({"position": i}, {})
    assert len(state.found()) == 2 and state.load()[0] == {"position": 3}
