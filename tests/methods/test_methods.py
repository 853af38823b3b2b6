"""Every method in a run of its own: it ends as in one go, and the readings are what they say."""

import json

import pytest
import torch
from helpers import (
    die_in_a_pass,
    errors,
    inject,
    make_method,
    make_model,
    make_samples,
    mean_loss,
    outcome,
    parameters,
    randomise,
    read,
)
from peft import PeftModel

import train_single_task
import train_slsd_seq
from evaluation.readings import READINGS
from models import ds_lora
from training import passes as passes_module
from utils_data import prepare_task, read_task

TASKS = ["T1_general", "T2_math", "T3_code"]


def test_a_bank_begins_each_task_anew(monkeypatch):
    model = randomise(inject(make_model()))
    ids = torch.arange(3, 12)[None]
    seeds = []
    monkeypatch.setattr(ds_lora, "seed_torch", lambda *what: seeds.append(what))
    bank = make_method("bank", model, seed=5)
    before = [p.clone() for p in parameters(model)]
    bank.begin_task("T1", [], None)
    assert all(map(torch.equal, before, parameters(model)))
    bank.begin_task("T2", [], "T1")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, make_model()(ids).logits)
    assert seeds == [(5, "T2", "slow branch"), (5, "T2", "fast branch")]


def rows_of(folder, reading):
    rows = read(folder / "seq_eval_loss.jsonl")
    return {(r["stage"], r["eval_task"]): r["loss"] for r in rows if r["branches"] == reading}


def test_the_readings_of_a_run(flags, tmp_path):
    argv = flags(task_order=TASKS, all_readings=True, eval_samples_per_task=4)
    assert train_slsd_seq.main(argv) == 0
    latest, own = (rows_of(tmp_path / "logs", name) for name in ("latest", "own"))
    stage, slow = (rows_of(tmp_path / "logs", name) for name in ("stage", "slow"))
    # Every task after every stage, those not yet learned too: forward transfer can be told.
    assert len(latest) == 4 * 3 and len(own) == len(stage) == len(slow) == 6
    for t, name in enumerate(TASKS):
        assert own[name, name] == stage[name, name] == latest[name, name] != slow[name, name]
        for later in TASKS[t:]:
            assert stage[later, name] == latest[name, name]
    summary = json.loads((tmp_path / "logs" / "seq_summary.json").read_text())
    assert summary["forward_transfer"] is not None
    drift = read(tmp_path / "logs" / "seq_drift.jsonl")
    assert [(r["stage"], r["probe_task"], r["teacher"]) for r in drift] == [
        ("T2_math", "T1_general", "T1_general"),
        ("T2_math", "T2_math", "T1_general"),
        ("T3_code", "T1_general", "T1_general"),
        ("T3_code", "T2_math", "T1_general"),
        ("T3_code", "T2_math", "T2_math"),
        ("T3_code", "T3_code", "T2_math"),
    ]
    assert all(r["kl_first"] > 0 for r in drift)


def runs_and_goes_on(argv, tmp_path, monkeypatch, shares=(0.4, 0.4)) -> dict:
    """What a run leaves; killed after each share of its passes it must leave the same."""
    cuttings = []
    with monkeypatch.context() as patch:
        cut = passes_module.make_passes
        patch.setattr(passes_module, "make_passes", lambda *a: cuttings.append(a) or cut(*a))
        assert train_slsd_seq.main(argv("whole")) == 0
    whole = outcome(tmp_path / "whole")
    for share in shares:
        die_in_a_pass(monkeypatch, int(share * len(cuttings)), argv("cut"))
    assert train_slsd_seq.main(argv("cut")) == 0
    assert outcome(tmp_path / "cut") == whole
    return whole


def in_folders(flags, tmp_path, **settings):
    """Builds the command line of a run in a folder of its own."""

    def argv(name):
        here = {"log_dir": tmp_path / name / "logs", "save_dir": tmp_path / name / "checkpoints"}
        common = {"save_steps": 1, "lora_dropout": 0.1, "eval_samples_per_task": 4}
        return flags(**common, **settings, **here)

    return argv


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "derpp", "memory_per_task": 3},
        {"method": "agem", "memory_per_task": 3},
        {"method": "ilora", "memory_per_task": 3},
        {"method": "olora"},
        {"method": "slsd_plus", "memory_per_task": 3, "fisher_samples": 3, "sync_every": 2},
        {"consolidate": "gram", "gram_samples": 6, "gram_rank": 4},
    ],
    ids=lambda settings: settings.get("method", "consolidate"),
)
def test_the_later_methods_run_and_go_on_after_kills_too(settings, flags, tmp_path, monkeypatch):
    """Killed in the second stage, and as it ends: after the last step, before the next save."""
    rate = {"lr_fast": 5e-3} if "consolidate" in settings else {"lr_lora": 5e-3}
    argv = in_folders(flags, tmp_path, task_order=TASKS[:2], **rate, **settings)
    runs_and_goes_on(argv, tmp_path, monkeypatch, shares=(0.55, 0.2))
    stages = json.loads(whole_summary(tmp_path))["stages"]
    keeps = settings.get("memory_per_task", 0)
    assert stages["T1_general"]["samples_kept"] == keeps
    # O-LoRA notes that there is an earlier task; what it keeps of it are branches.
    assert stages["T1_general"]["bytes_kept"] > (100 if "olora" not in settings.values() else 0)
    assert stages["T2_math"]["samples_a_step"]["backward"] >= 7


@pytest.mark.parametrize("method", ["seq_lora", "replay", "ewc", "lwf", "bank", "joint"])
def test_each_method_runs_and_goes_on_after_kills(method, flags, tmp_path, monkeypatch):
    """Killed in the middle of the second and of the last stage: the same numbers as in one go."""
    own = {"memory_per_task": 0.3} if method == "replay" else {}
    argv = in_folders(flags, tmp_path, method=method, lr_lora=5e-3, task_order=TASKS, **own)
    runs_and_goes_on(argv, tmp_path, monkeypatch)
    stages = list(json.loads(whole_summary(tmp_path))["stages"])
    assert stages == (["joint"] if method == "joint" else TASKS)
    lines = read(tmp_path / "whole" / "logs" / "seq_train_loss.jsonl")
    assert {"lr_lora", "grad_norm_lora"} <= set(lines[0]) and "lr_slow" not in lines[0]
    distils = [line["kd_loss"] is not None for line in lines if line["task"] != "T1_general"]
    assert any(distils) == (method == "lwf")
    if method == "bank":
        folder = tmp_path / "whole" / "logs"
        latest, own = rows_of(folder, "latest"), rows_of(folder, "own")
        for task in TASKS:
            assert own["T3_code", task] == latest[task, task]
    if method == "joint":
        # As many steps as the three tasks have, over all their samples.
        samples = sum(len(range(19)) for _ in TASKS)
        assert max(line["step"] for line in lines) == -(-samples // 8)


@pytest.mark.parametrize(
    ("settings", "readings"),
    [
        ({"method": "slsd_plus", "memory_per_task": 3, "lr_lora": 5e-3}, {"latest"}),
        ({"consolidate": "gram", "lr_fast": 5e-3}, {*READINGS}),
    ],
    ids=["slsd_plus", "consolidate"],
)
def test_what_is_offered_generates_is_routed_and_loads_in_peft(
    settings, readings, flags, make_config, tmp_path, tokenizer
):
    short = {"task_order": TASKS[:2], "eval_samples_per_task": 2, "max_steps_per_task": 3}
    argv = flags(**short, **settings, generate=True, lora_dropout=0.0)
    assert train_slsd_seq.main(argv) == 0
    lines = read(tmp_path / "logs" / "seq_eval_loss.jsonl")
    assert {line["branches"] for line in lines} == readings
    scored = {(line["stage"], line["task"]) for line in read(tmp_path / "logs/seq_scores.jsonl")}
    assert ("T2_math", "T1_general") in scored and ("T2_math", "T2_math") in scored
    peft = PeftModel.from_pretrained(make_model(), tmp_path / "checkpoints" / "seq_T2_math").eval()
    cfg = make_config(**short)
    rows, test = read_task(cfg, "T1_general")
    held_out = prepare_task(cfg, tokenizer, "T1_general", rows, test).held_out
    expected = rows_of(tmp_path / "logs", "latest")["T2_math", "T1_general"]
    with torch.no_grad():
        loss = mean_loss(peft, [held_out[i] for i in range(2)])
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def whole_summary(folder) -> str:
    return (folder / "whole" / "logs" / "seq_summary.json").read_text()


def test_methods_that_need_several_tasks_are_refused_for_one(flags, capsys):
    assert train_single_task.main([*flags(method="replay"), "--task", "T2_math"]) == 2
    assert "--method replay needs several tasks" in errors(capsys)[0]


def test_lwf_reads_as_many_samples_as_it_distils_and_moves_both_branches():
    model = randomise(inject(make_model()))
    lwf = make_method("lwf", model, most_steps=5, kd_every=2, kd_batch_size=2)
    assert lwf.read_task("T1", make_samples([9] * 12), None) == "" and lwf.probes is None
    lwf.read_task("T2", make_samples([9] * 12), "T1")
    assert len(lwf.probes) == 3 * 2
    lwf.aux_backward(0, lambda loss: loss.backward())
    assert all(p.grad is not None for p in parameters(model))
