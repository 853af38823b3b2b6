"""What makes each method what it is, the readings, and the drift."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import errors, inject, make_model, make_samples, make_slsd, passes, randomise, read
from peft import LoraConfig, get_peft_model

import train_single_task
import train_slsd_seq
from methods.ewc import EWC, Bank, Replay
from models.answers import kl_divergence
from models.drift import Drift
from models.ds_lora import (
    BRANCHES,
    branch_parameters,
    branches_restored,
    ds_lora_layers,
    get_lora_param_groups,
    load_adapter,
    save_adapter,
)
from training import session


def alone(value):
    return [value]


def parameters(model):
    return [p for branch in BRANCHES for p in branch_parameters(model, branch)]


def mean_loss(model, samples):
    """Cross entropy per response token, sample by sample."""
    total, tokens = 0.0, 0
    for sample in samples:
        logits = model(sample["input_ids"][None]).logits[0, :-1]
        total = total + F.cross_entropy(logits, sample["labels"][1:], reduction="sum")
        tokens += int((sample["labels"] != -100).sum())
    return total / tokens


def step(model, groups, samples):
    optimizer = torch.optim.AdamW(groups)
    for _ in range(3):
        optimizer.zero_grad()
        mean_loss(model, samples).backward()
        optimizer.step()


def test_both_branches_at_one_rate_are_one_lora_of_twice_the_rank(tmp_path):
    """Three AdamW steps of ours and of PEFT's LoRA of rank 8 give the same product B A."""
    ours, samples = randomise(inject(make_model(), r=4, alpha=8)), make_samples([9, 14])
    options = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [2, 3]}
    peft = get_peft_model(make_model(), LoraConfig(r=8, lora_alpha=16, **options))
    for name, layer in ds_lora_layers(ours).items():
        theirs = peft.get_submodule(f"base_model.model.{name}")
        (A_slow, B_slow), (A_fast, B_fast) = layer.branch("slow"), layer.branch("fast")
        theirs.lora_A.default.weight.data = torch.cat([A_slow, A_fast]).detach().clone()
        theirs.lora_B.default.weight.data = torch.cat([B_slow, B_fast], 1).detach().clone()
    step(ours, get_lora_param_groups(ours, 1e-2, 0.01), samples)
    trained = [p for p in peft.parameters() if p.requires_grad]
    step(peft, [{"params": trained, "lr": 1e-2, "weight_decay": 0.01}], samples)
    for name, layer in ds_lora_layers(ours).items():
        theirs = peft.get_submodule(f"base_model.model.{name}")
        B = torch.cat([layer.branch("slow")[1], layer.branch("fast")[1]], 1)
        torch.testing.assert_close(B, theirs.lora_B.default.weight, atol=1e-5, rtol=1e-4)


def test_replay_learns_kept_samples_of_earlier_tasks_again():
    model = randomise(inject(make_model()))
    old, older = make_samples([12, 7, 20, 9], seed=1), make_samples([8, 6], seed=2)
    replay = Replay(model, passes, fraction=0.5, batch_size=2, seed=0)
    assert replay.aux_backward(0, None) is None
    replay.end_task("T1", older)
    replay.end_task("T2", old)
    assert len(replay.samples) == 3
    kept = [sample["input_ids"].tolist() for sample in replay.samples]
    assert all(ids in [s["input_ids"].tolist() for s in [*old, *older]] for ids in kept)
    seen = []
    replay.make_passes = lambda samples: seen.extend(samples) or passes(samples)
    replay.aux_backward(5, lambda loss: loss.backward())
    assert len(seen) == 2
    expected = torch.autograd.grad(mean_loss(model, seen), parameters(model))
    for parameter, gradient in zip(parameters(model), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)
    other = Replay(model, passes, fraction=0.5, batch_size=2, seed=0)
    other.restore(replay.state())
    assert [s["id"] for s in other.samples] == [s["id"] for s in replay.samples]
    assert all(
        torch.equal(a[key], b[key])
        for a, b in zip(other.samples, replay.samples, strict=True)
        for key in ("input_ids", "labels")
    )


def make_ewc(model, **changes):
    settings = {"processes": 1, "weight": 3.0, "num_samples": 100, "seed": 0, **changes}
    return EWC(model, parameters(model), passes, alone, **settings)


def test_ewc_penalises_by_the_fisher_of_each_task_and_the_last_end():
    model = randomise(inject(make_model(), dropout=0.4)).train()
    tasks = [make_samples([12, 7], seed=1), make_samples([9], seed=2)]
    ewc = make_ewc(model)
    ewc.aux_backward(0, None)
    fisher = [torch.zeros_like(p) for p in parameters(model)]
    for name, samples in zip("ab", tasks, strict=True):
        model.eval()
        tokens = sum(int((s["labels"] != -100).sum()) for s in samples)
        for sample in samples:
            length = int((sample["labels"] != -100).sum())
            loss = mean_loss(model, [sample]) * length
            for total, gradient in zip(
                fisher, torch.autograd.grad(loss, parameters(model)), strict=True
            ):
                total += gradient**2 / tokens
        model.train()
        ewc.end_task(name, samples)
    assert model.training
    for ours, expected in zip(ewc.fisher, fisher, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-3)
    anchor = [p.detach().clone() for p in parameters(model)]
    assert ewc.penalty().item() == 0
    randomise(model, seed=9)
    moved = zip(fisher, parameters(model), anchor, strict=True)
    by_hand = sum(float((f * (p.detach() - a).square()).sum()) for f, p, a in moved) * 3.0 / 2
    assert ewc.penalty().item() == pytest.approx(by_hand, rel=1e-3)
    ewc.aux_backward(0, lambda loss: loss.backward())
    for f, p, a in zip(fisher, parameters(model), anchor, strict=True):
        torch.testing.assert_close(p.grad, 3.0 * f * (p - a).detach(), atol=1e-5, rtol=1e-3)
    other = make_ewc(model)
    other.restore(ewc.state())
    assert other.penalty().item() == ewc.penalty().item()


def test_a_bank_begins_each_task_anew():
    model = randomise(inject(make_model()))
    ids = torch.arange(3, 12)[None]
    seeds = []
    bank = Bank(model, lambda *what: seeds.append(what) or torch.manual_seed(1), seed=5)
    bank.begin_task("T2", [])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, make_model()(ids).logits)
    assert seeds == [(5, "T2", "slow branch"), (5, "T2", "fast branch")]


def test_kd_flags_move_what_they_say():
    """Branches and forward; the slow branch alone is a student that differs from its teacher."""
    found = {}
    for name, changes in {
        "specified": {},
        "all": {"branches": "all"},
        "slow forward": {"forward": "slow"},
    }.items():
        model = randomise(inject(make_model()))
        slsd = make_slsd(model, top_k=0, **changes)
        slsd.begin_task("T", make_samples([12, 7, 20, 9]))
        randomise(model, seed=3)
        kl, tokens = slsd.aux_backward(0, lambda loss: loss.backward())
        has = [p.grad is not None for p in branch_parameters(model, "fast")]
        assert all(has) == any(has) == (name == "all")
        found[name] = float(kl) / tokens
    assert found["specified"] == found["all"] != found["slow forward"]


def test_random_probes_are_not_the_surest_and_are_read_alone():
    model, samples = randomise(inject(make_model())), make_samples([12, 7, 20, 9, 15, 11, 8, 10])
    slsd = make_slsd(model, choice="random", threshold=0.0)
    slsd.begin_task("T", samples)
    assert len(slsd.buffer) == len(slsd.pool_entropies) == 4


def test_replayed_probes_carry_the_answers_of_the_model_that_had_learned_them():
    model = randomise(inject(make_model()))
    first, second = make_samples([12, 7, 20], seed=1), make_samples([9, 15], seed=2)
    slsd = make_slsd(model, probes="replay", top_k=0, batch_size=9)
    slsd.end_task("T1", first)
    assert len(slsd.earlier) == 1 and slsd.buffer is None
    slsd.begin_task("T2", second)
    assert len(slsd.auxiliary_samples()) == 5
    kl, tokens = slsd.aux_backward(0, lambda loss: loss.backward())
    assert float(kl) / tokens < 1e-4
    randomise(model, seed=3)
    slsd.end_task("T2", second)
    now = slsd.earlier[1]
    ids = {sample["id"]: sample for sample in second}
    for i, sample in enumerate(now):
        plain = model(ids[sample["id"]]["input_ids"][None]).logits[0, :-1]
        start = len(plain) - int(now.response_lengths[i])
        log_probs, classes, _ = now.answers(i)
        expected = plain[start:].log_softmax(-1).gather(-1, classes)
        torch.testing.assert_close(log_probs, expected.detach(), atol=0.02, rtol=1e-2)
    other = make_slsd(model, probes="replay", top_k=0, batch_size=9)
    other.restore(slsd.state())
    assert [s["id"] for s in other.auxiliary_samples()] == [
        s["id"] for s in slsd.auxiliary_samples()
    ]


def test_drift_is_the_kl_of_the_first_tokens_and_of_the_rest():
    model = randomise(inject(make_model()))
    samples = make_samples([12, 7, 30])
    drift = Drift(model, passes, alone, top_k=0)
    drift.remember("T1/T1", samples)
    assert drift.measure("T1/T1")["kl_rest"] < 1e-4
    teacher = [model(s["input_ids"][None]).logits[0].detach() for s in samples]
    randomise(model, seed=4)
    first, rest = [], []
    for sample, then in zip(samples, teacher, strict=True):
        now = model(sample["input_ids"][None]).logits[0]
        start = len(then) // 2
        for position in range(start - 1, len(then) - 1):
            p, q = (logits[position].detach().log_softmax(-1) for logits in (then, now))
            kl = float((p.exp() * (p - q)).sum())
            (first if position < start + 4 else rest).append(kl)
    other = Drift(model, passes, alone, top_k=0)
    other.restore(drift.state())
    found = other.measure("T1/T1")
    assert found["kl_first"] == pytest.approx(sum(first) / len(first), rel=0.02)
    assert found["kl_rest"] == pytest.approx(sum(rest) / len(rest), rel=0.02)
    drift.remember("T2/T2", make_samples([4]))
    assert math.isnan(drift.measure("T2/T2")["kl_rest"])


def test_kl_by_position_is_not_below_zero_and_zero_for_itself():
    torch.manual_seed(0)
    logits = torch.randn(6, 40)
    top = logits.log_softmax(-1).topk(8)
    tail = torch.log1p(-top.values.exp().sum(-1))
    assert kl_divergence(logits, top.values, top.indices, tail).abs().max() < 1e-5
    assert (kl_divergence(torch.randn(6, 40), top.values, top.indices, tail) > 0).all()


def test_one_branch_is_loaded_and_the_other_stays_and_all_comes_back(tmp_path):
    model = randomise(inject(make_model()), seed=1)
    save_adapter(model, tmp_path, "base")
    saved = [p.clone() for p in parameters(model)]
    randomise(model, seed=2)
    before = [p.clone() for p in parameters(model)]
    half = len(saved) // 2
    with branches_restored(model):
        load_adapter(model, tmp_path, ("fast",))
        now = parameters(model)
        assert all(torch.equal(a, b) for a, b in zip(now[:half], before[:half], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(now[half:], saved[half:], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(parameters(model), before, strict=True))


TASKS = ["T1_general", "T2_math", "T3_code"]


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


@pytest.mark.parametrize("method", ["seq_lora", "replay", "ewc", "lwf", "bank", "joint"])
def test_each_method_runs_and_goes_on_after_kills(method, flags, tmp_path, monkeypatch):
    """Killed in the middle of the second and of the last stage: the same numbers as in one go."""
    from helpers import die_in_a_pass, outcome

    def argv(name):
        here = {"log_dir": tmp_path / name / "logs", "save_dir": tmp_path / name / "checkpoints"}
        settings = {"save_steps": 1, "lr_lora": 5e-3, "replay_fraction": 0.3, "lora_dropout": 0.1}
        return flags(method=method, task_order=TASKS, eval_samples_per_task=4, **settings, **here)

    cuttings = []
    with monkeypatch.context() as patch:
        cut = session.make_passes
        patch.setattr(passes_module, "make_passes", lambda *a: cuttings.append(a) or cut(*a))
        assert train_slsd_seq.main(argv("whole")) == 0
    whole = outcome(tmp_path / "whole")
    for share in (0.4, 0.4):
        die_in_a_pass(monkeypatch, int(share * len(cuttings)), argv("cut"))
    assert train_slsd_seq.main(argv("cut")) == 0
    assert outcome(tmp_path / "cut") == whole
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


def whole_summary(folder) -> str:
    return (folder / "whole" / "logs" / "seq_summary.json").read_text()


def test_methods_that_need_several_tasks_are_refused_for_one(flags, capsys):
    assert train_single_task.main([*flags(method="replay"), "--task", "T2_math"]) == 2
    assert "--method replay needs several tasks" in errors(capsys)[0]


def test_the_slow_branch_alone_cannot_teach_the_fast_one(flags, capsys):
    assert train_slsd_seq.main(flags(kd_forward="slow", kd_branches="all")) == 2
    assert "give --kd_branches slow" in errors(capsys)[0]
