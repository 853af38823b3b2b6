"""Many runs by one command: what is planned, refused, done again and compared."""

import json

import pytest
from test_scripts import errors, read

import run_experiments
from configs.base_config import UserError, parse_config
from run_experiments import METHODS, Experiments, plan


def planned(argv):
    return plan(*parse_config(argv, Experiments, description=""))


def test_every_method_is_one_that_the_script_takes(flags):
    runs = planned(flags())
    assert [run.name for run in runs] == [f"{method}/seed42" for method in METHODS]
    cfg = {run.name.partition("/")[0]: run.cfg for run in runs}
    assert cfg["seq_lora_all"].num_frozen_layers == 0 and cfg["seq_lora"].num_frozen_layers == 2
    assert not cfg["ds_lora"].use_slsd and cfg["slsd"].kd_probes == "current"
    assert cfg["slsd_replay"].kd_probes == "replay" and cfg["slsd_replay"].kd_branches == "slow"
    assert cfg["slsd_replay_all"].kd_branches == "all"
    # What is given to all runs reaches them, whatever its type.
    assert all(
        c.lora_r == 4 and c.lora_target_modules == ["q_proj", "v_proj"] for c in cfg.values()
    )


def test_methods_orders_and_seeds_are_multiplied(flags, tmp_path):
    more = ["--methods", "slsd,kd_lambda=3,lr_slow=2e-3", "--orders", "12345", "51234"]
    runs = planned([*flags(), *more, "--seeds", "1", "2"])
    names = [
        f"slsd,kd_lambda=3,lr_slow=2e-3{order}/seed{s}" for order in ("", "@51234") for s in (1, 2)
    ]
    assert [run.name for run in runs] == names
    assert all(run.cfg.kd_lambda == 3 and run.cfg.lr_slow == 2e-3 for run in runs)
    assert runs[2].cfg.task_order[:2] == ["T5_safety", "T1_general"]
    assert [run.cfg.seed for run in runs] == [1, 2, 1, 2]
    assert str(runs[3].summary) == f"{tmp_path}/logs/{names[3]}/seq_summary.json"


def test_all_that_is_wrong_is_told_at_once(flags, capsys):
    more = ["--methods", "best", "slsd,kd_lambda=-1", "slsd,lamda=1", "--orders", "123"]
    assert run_experiments.main([*flags(), *more]) == 2
    lines = errors(capsys)
    assert lines[0].startswith("error: --methods best: give some of seq_lora")
    assert any("--orders 123: give each digit" in line for line in lines)
    more = ["--methods", "slsd,kd_lambda=-1", "slsd,kd_lamda=1"]
    assert run_experiments.main([*flags(), *more]) == 2
    lines = errors(capsys)
    assert "slsd,kd_lambda=-1: kd_lambda is -1.0" in lines[0]
    assert "unknown option --kd_lamda; did you mean --kd_lambda?" in lines[1]


def test_what_is_missing_is_run_and_the_rest_left_alone(flags, tmp_path, capfd, monkeypatch):
    """The real command: two runs, one of which fails; given again, only that one runs."""
    argv = [
        *flags(max_steps_per_task=1, eval_samples_per_task=2, task_order=["T2_math"]),
        *("--methods", "seq_lora", "slsd", "--seeds", "7"),
    ]
    blocked = tmp_path / "logs" / "slsd"
    blocked.parent.mkdir()
    blocked.write_text("a file where the folder should be")
    assert run_experiments.main(argv) == 2
    out, err = capfd.readouterr()
    assert "error: 1 runs failed (slsd/seed7)" in err and "[2/2] slsd/seed7: starting" in out
    assert "| seq_lora |" in out
    done = read(tmp_path / "logs" / "seq_lora" / "seed7" / "seq_train_loss.jsonl")
    assert len(done) == 5

    blocked.unlink()
    started = []
    run = run_experiments.subprocess.run
    monkeypatch.setattr(
        run_experiments.subprocess, "run", lambda argv: started.append(argv) or run(argv)
    )
    assert run_experiments.main(argv) == 0
    out = capfd.readouterr().out
    assert len(started) == 1 and "[1/2] seq_lora/seed7: finished" in out
    assert "| seq_lora |" in out and "| slsd     |" in out
    assert (tmp_path / "logs" / "compare.pdf").exists()
    assert run_experiments.main([*argv, "--lr_lora", "3e-4"]) == 2
    assert "holds a run with other settings (lr_lora 5e-05 -> 0.0003)" in errors(capfd)[0]
    assert run_experiments.main([*argv, "--max_steps_per_task", "2", "--overwrite", "1"]) == 0
    assert len(started) == 3


def test_an_interrupt_ends_all(flags, capsys, monkeypatch):
    class Ended:
        returncode = 130

    monkeypatch.setattr(run_experiments.subprocess, "run", lambda argv: Ended)
    assert run_experiments.main([*flags(), "--methods", "seq_lora", "replay"]) == 130
    assert "replay" not in capsys.readouterr().out


def test_a_finished_run_is_compared_by_what_changes_results(flags, tmp_path):
    (run,) = planned([*flags(), "--methods", "seq_lora"])
    run.summary.parent.mkdir(parents=True)
    config = json.loads(json.dumps(run.cfg.__dict__))
    run.summary.write_text(json.dumps({"config": {**config, "tokens_per_pass": 1}}))
    assert planned([*flags(), "--methods", "seq_lora"])
    run.summary.write_text(json.dumps({"config": {**config, "seed": 1}}))
    with pytest.raises(UserError, match="seed 1 -> 42"):
        planned([*flags(), "--methods", "seq_lora"])
