"""Many runs by one command: what is planned, refused, done again and compared."""

import json
import signal
from collections import Counter

import pytest
import torch
from helpers import ROOT, errors, make_rows, outcome, read, write_rows

import run_experiments
import train_slsd_seq
from configs.command_line import UserError
from methods import parse_config
from run_experiments import VARIANTS, Experiments, plan, plan_tables
from training import side_by_side
from training.side_by_side import find_places


def planned(argv):
    return plan(*parse_config(argv, Experiments, description="", every_method=True), argv)


def test_every_method_is_one_that_the_script_takes(flags):
    runs = planned(flags())
    assert [run.name for run in runs] == [f"{method}/seed42" for method in VARIANTS]
    cfg = {run.name.partition("/")[0]: run.cfg for run in runs}
    assert cfg["seq_lora_all"].num_frozen_layers == 0 and cfg["seq_lora"].num_frozen_layers == 2
    assert not cfg["ds_lora"].use_slsd and cfg["slsd"].kd_probes == "current"
    assert cfg["slsd_replay"].kd_probes == "replay" and cfg["slsd_replay"].kd_branches == "slow"
    assert cfg["slsd_replay_all"].kd_branches == "all"
    # What is given to all runs reaches them, whatever its type.
    assert all(
        c.lora_r == 4 and c.lora_target_modules == ["q_proj", "v_proj"] for c in cfg.values()
    )


def test_a_knob_given_for_all_runs_reaches_those_that_have_it(flags):
    runs = planned([*flags(), "--ewc_lambda", "7", "--kd_lambda", "3"])
    cfg = {run.name.partition("/")[0]: run.cfg for run in runs}
    assert cfg.keys() == VARIANTS.keys()
    assert cfg["ewc"].ewc_lambda == 7 and cfg["lwf"].kd_lambda == cfg["slsd"].kd_lambda == 3
    assert not hasattr(cfg["bank"], "ewc_lambda")
    # A field of the base configuration that is nothing to it: as it was.
    assert cfg["ewc"].kd_lambda == 1


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
    more = ["--methods", "best", "slsd,kd_lambda=-1", "slsd,lamda=1", "--orders", "127"]
    assert run_experiments.main([*flags(), *more]) == 2
    lines = errors(capsys)
    assert lines[0].startswith("error: --orders 127: give digits of 12345")
    given = f"--methods best: give some of {', '.join(VARIANTS)}"
    assert any(given in line for line in lines)
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
    blocked = tmp_path / "logs" / "slsd@2"
    blocked.parent.mkdir()
    blocked.write_text("a file where the folder should be")
    assert run_experiments.main(argv) == 2
    out, err = capfd.readouterr()
    assert "error: failed: slsd@2/seed7;" in err and "[2/2] slsd@2/seed7: starting" in out
    assert "| seq_lora@2 |" in out
    done = read(tmp_path / "logs" / "seq_lora@2" / "seed7" / "seq_train_loss.jsonl")
    assert len(done) == 1

    blocked.unlink()
    started = []
    run_all = run_experiments.run_side_by_side
    monkeypatch.setattr(
        run_experiments,
        "run_side_by_side",
        lambda commands, places: started.extend(commands) or run_all(commands, places),
    )
    assert run_experiments.main(argv) == 0
    out = capfd.readouterr().out
    assert len(started) == 1 and "[1/2] seq_lora@2/seed7: finished" in out
    assert "| seq_lora@2 |" in out and "| slsd@2     |" in out
    assert (tmp_path / "logs" / "compare.pdf").exists()
    assert run_experiments.main([*argv, "--lr_lora", "3e-4"]) == 2
    assert "holds another run (lr_lora 5e-05 -> 0.0003)" in errors(capfd)[0]
    run_all = lambda commands, _: ({command.name: 0 for command in commands}, 0)  # noqa: E731
    assert run_experiments.main([*argv, "--max_steps_per_task", "2", "--overwrite", "1"]) == 0
    assert len(started) == 3


def test_a_finished_run_with_more_settings_is_another_one(flags, capsys):
    argv = [*flags(max_steps_per_task=1, task_order=["T2_math"]), "--methods", "seq_lora"]
    (run,) = planned(argv)
    assert train_slsd_seq.main([*run.argv, "--use_rslora", "true"]) == 0
    assert [run.cfg.use_rslora for run in planned([*argv, "--use_rslora", "true"])] == [True]
    with pytest.raises(UserError, match="holds another run .use_rslora True -> None"):
        planned(argv)


def test_an_interrupt_ends_all(flags, capsys, monkeypatch):
    monkeypatch.setattr(run_experiments, "run_side_by_side", lambda *_: ({}, signal.SIGINT))
    assert run_experiments.main([*flags(), "--methods", "seq_lora", "replay"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(("part", "chosen"), [("1/2", [0, 2]), ("2/2", [1]), ("3/3", [2])])
def test_the_parts_are_all_runs_once(flags, capsys, monkeypatch, part, chosen):
    given = []
    monkeypatch.setattr(
        run_experiments,
        "run_side_by_side",
        lambda commands, places: given.extend(commands) or ({c.name: 0 for c in commands}, 0),
    )
    argv = [*flags(), "--methods", "seq_lora", "--seeds", "1", "2", "3", "--part", part]
    assert run_experiments.main(argv) == 0
    assert [c.name for c in given] == [f"[{i + 1}/3] seq_lora/seed{i + 1}" for i in chosen]
    assert run_experiments.main([*argv, "--part", "4/3"]) == 2
    assert errors(capsys) == ["error: part is '4/3': give 1/3 to 3/3"]


def test_two_at_a_time_give_the_results_of_one(flags, tmp_path, capsys, monkeypatch):
    """The real command, two runs that fill one prefix store; on one thread each, bit for bit."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = {"max_steps_per_task": 2, "eval_samples_per_task": 2, "task_order": ["T2_math"]}
    here = {"log_dir": tmp_path / "two" / "logs", "save_dir": tmp_path / "two" / "checkpoints"}
    both = ["--methods", "seq_lora", "slsd"]
    assert run_experiments.main([*flags(**small, **here), *both, "--jobs", "2"]) == 0
    out = capsys.readouterr().out
    assert "[1/2] seq_lora@2/seed42: done" in out and "[2/2] slsd@2/seed42: done" in out
    assert "average final loss" in (tmp_path / "two/logs/slsd@2_seed42.txt").read_text()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for run in planned([*flags(**small), *both]):
            assert train_slsd_seq.main(run.argv) == 0
            for name in ("logs", "checkpoints"):
                alone, beside = (
                    outcome(folder / name / run.name) for folder in (tmp_path, tmp_path / "two")
                )
                for found in (alone, beside):
                    found.get("seq_summary.json", {"config": {}})["config"].pop("prefix_store", "")
                assert alone == beside
    finally:
        torch.set_num_threads(threads)


def test_places(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert find_places(1, "cuda:1") == [{}]
    assert find_places(2, "cpu") == [{"OMP_NUM_THREADS": "2"}] * 2
    assert find_places(9, "auto")[8] == {"OMP_NUM_THREADS": "1"}
    # For each level of nested work, as OpenMP has it.
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert find_places(2, "cpu") == [{"OMP_NUM_THREADS": "2"}] * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(side_by_side, "gpus_by_free_memory", lambda: ["GPU-b", "GPU-c", "GPU-a"])
    expected = [{"CUDA_VISIBLE_DEVICES": "GPU-b"}, {"CUDA_VISIBLE_DEVICES": "GPU-c"}]
    assert find_places(2, "auto") == find_places(2, "cuda") == expected
    with pytest.raises(UserError, match="--jobs 4: there are 3 GPUs"):
        find_places(4, "auto")
    with pytest.raises(UserError, match="--device cuda:1: with --jobs 2"):
        find_places(2, "cuda:1")


def test_a_finished_run_of_another_model_or_other_data_is_not_taken_for_this_one(flags, tmp_path):
    argv = [*flags(task_order=["T2_math"], max_steps_per_task=1), "--methods", "seq_lora"]
    (run,) = planned(argv)
    assert train_slsd_seq.main(run.argv) == 0
    assert planned([*argv, "--tokens_per_pass", "7"])
    with pytest.raises(UserError, match="max_steps_per_task 1 -> 2"):
        planned([*argv, "--max_steps_per_task", "2"])
    other = tmp_path / "data"
    write_rows(other / "T2_math.jsonl", make_rows("T2_math", 31))
    with pytest.raises(UserError, match="another data of T2_math"):
        planned([*argv, "--data_dir", str(other)])
    summary = json.loads(run.summary.read_text())
    summary["identity"]["weights"] = "others"
    run.summary.write_text(json.dumps(summary))
    with pytest.raises(UserError, match="weights others ->"):
        planned(argv)


def test_a_setting_with_several_values_is_a_method_with_each(flags):
    more = ["--methods", "slsd,kd_lambda=1|3,lr_slow=2e-3", "ewc,ewc_lambda=5|6,lr_lora=1e-3|2e-3"]
    names = [run.method for run in planned([*flags(), *more])]
    assert names == [
        *(f"slsd,kd_lambda={x},lr_slow=2e-3" for x in (1, 3)),
        *(f"ewc,ewc_lambda={x},lr_lora={y}" for x in (5, 6) for y in ("1e-3", "2e-3")),
    ]


def test_a_file_of_runs_has_tables_and_what_is_given_wins(flags, tmp_path, capsys):
    path = tmp_path / "runs.yaml"
    path.write_text(
        "one: &one\n  methods: ['slsd,kd_lambda=1|3', replay]\n  seeds: [1, 2]\n  kd_top_k: 9\n"
        "  against: slsd,kd_lambda=3\ntwo:\n  <<: *one\n  methods: [replay]\n  against: replay\n"
    )
    argv = [*flags(), "--runs", str(path)]
    (one, two), cfg, _ = plan_tables(argv)
    assert [run.name for run in two.runs] == ["two/replay/seed1", "two/replay/seed2"]
    assert (len(one.runs), one.against) == (6, "slsd,kd_lambda=3")
    assert one.runs[0].cfg.kd_top_k == 9 and one.runs[0].cfg.lr_fast == 5e-3
    assert str(two.runs[0].summary) == f"{tmp_path}/logs/two/replay/seed1/seq_summary.json"
    assert two.log_dir == f"{tmp_path}/logs/two" and cfg.log_dir == f"{tmp_path}/logs"
    (two,), *_ = plan_tables([*argv, "--runs", f"{path},two", "--seeds", "5", "--kd_top_k", "7"])
    assert [(run.cfg.seed, run.name) for run in two.runs] == [(5, "two/replay/seed5")]

    path.write_text("one: {methods: [replay], sedes: [1]}\ntwo: {against: ewc, methods: [lwf]}\n")
    assert run_experiments.main(argv) == 2
    assert errors(capsys) == [
        "error: one: unknown option --sedes; did you mean --seeds?",
        "error: two: --against ewc: give one of lwf",
    ]


def test_finished_runs_are_compared_with_the_reference_once_it_is_there(
    flags, tmp_path, monkeypatch
):
    given = []
    monkeypatch.setattr(run_experiments.plot_loss, "main", lambda argv: given.append(argv) or 0)
    monkeypatch.setattr(run_experiments, "run_side_by_side", lambda *_: ({}, 0))
    monkeypatch.setattr(run_experiments, "check_finished", lambda run: None)
    argv = [*flags(), "--methods", "replay,lr_lora=1e-3", "ewc", "--against", "replay"]
    argv += ["--dry_run", "true"]
    assert run_experiments.main(argv) == 0 and not given
    for method in ("ewc", "replay,lr_lora=1e-3"):
        folder = tmp_path / "logs" / method / "seed42"
        folder.mkdir(parents=True)
        (folder / "seq_summary.json").touch()
        assert run_experiments.main(argv) == 0
    assert "--against" not in given[0]
    assert given[1][-2:] == ["--against", "replay,lr_lora=1e-3"]


def test_the_protocol_is_a_file_of_runs():
    """Every setting of it is known; tuning gives each method the same number of trials."""
    path = ROOT / "tests" / "benchmarks" / "protocol.yaml"
    one_order = ["--seeds", "1", "--orders"]
    for names, order in (("tuning_a,final_a,ablation_a", "five1"), ("tuning_b,final_b", "12345")):
        tables, *_ = plan_tables(["--runs", f"{path},{names}", *one_order, order])
        tuning, final, *ablation = tables
        trials = Counter(run.method.partition(",")[0] for run in tuning.runs)
        assert set(trials.values()) == {4}
        assert trials.keys() == {run.method.partition(",")[0] for run in final.runs}
        assert final.against.startswith("consolidated,")
        assert {run.cfg.data_dir for run in tuning.runs} == {"data_tuning"}
        assert {run.cfg.data_dir for run in final.runs} == {"data_final"}
        if ablation:
            kept = [run for run in ablation[0].runs if run.method.startswith("slsd_plus,")]
            assert len(kept) == 8 and {run.cfg.memory_per_task for run in kept} == {0.05}
