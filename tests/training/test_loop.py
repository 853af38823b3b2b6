"""The training loop against a loop by hand, and what a step may and may not move."""

import copy
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import inject, make_journal, make_model, make_rows, mean_loss, randomise

import train_slsd_seq
from configs.command_line import UserError
from models.adapter import load_adapter
from models.ds_lora import BRANCHES, branch_parameters, get_ds_lora_param_groups
from models.forward import IGNORE, response_tokens
from training.loop import TaskTraining, clip_grad_norm, evaluate_loss, lr_multiplier
from training.plan import count_steps
from training.saving import JsonlLog
from training.session import Session, enable_checkpointing
from utils_data import prepare_task

TASK = "T2_math"


@pytest.fixture
def make_session(make_config, tokenizer):
    """Builds a session on the tiny model, both branches random, with some fields changed."""

    def build(checkpointing=False, new=False, base_dtype=torch.float32, **changes):
        cfg = make_config(**changes)
        model = inject(make_model().to(base_dtype), dropout=cfg.lora_dropout)
        if not new:
            randomise(model)
        if checkpointing:
            enable_checkpointing(model)
        data = {
            task: prepare_task(cfg, tokenizer, task, make_rows(task, 30)) for task in cfg.task_order
        }
        journal = make_journal(cfg, model, tokenizer)
        return cfg, Session(data, journal.passes, journal)

    return build


def run(cfg, session, tmp_path, task=TASK, **kwargs):
    """Trains one task and returns its log lines."""
    path = tmp_path / "log.jsonl"
    path.unlink(missing_ok=True)
    with JsonlLog(path) as log:
        samples, journal = session.data[task].train, session.journal
        TaskTraining(cfg, session.passes, task, samples, log, journal=journal, **kwargs).run()
    return [json.loads(line) for line in path.read_text().splitlines()]


def values(model, branch):
    return [p.detach().clone() for p in branch_parameters(model, branch)]


def same(first, second):
    return all(map(torch.equal, first, second))


def test_three_steps_against_a_loop_by_hand(make_session, tmp_path):
    cfg, session = make_session(
        lora_dropout=0.0, lr_schedule="constant", warmup_ratio=0.0, max_grad_norm=0.5
    )
    model, steps, cut = copy.deepcopy(session.passes.model), [], session.passes.make
    session.passes.make = lambda samples: steps.append(samples) or cut(samples)
    lines = run(cfg, session, tmp_path)
    assert [len(samples) for samples in steps] == [8, 8, 8]
    assert (
        len({s["id"] for samples in steps for s in samples}) == 24 == len(session.data[TASK].train)
    )

    slow, fast = branch_parameters(model, "slow"), branch_parameters(model, "fast")
    optimizers = [
        torch.optim.AdamW(params, lr=lr, weight_decay=0.01)
        for params, lr in ((slow, cfg.lr_slow), (fast, cfg.lr_fast))
    ]
    for samples, line in zip(steps, lines, strict=True):
        losses = []
        for sample in samples:
            logits = model(sample["input_ids"][None]).logits[0]
            for position, label in enumerate(sample["labels"].tolist()):
                if label != IGNORE:
                    losses.append(-logits[position - 1].log_softmax(-1)[label])
        loss = sum(losses) / len(losses)
        loss.backward()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        for name, params, optimizer in zip(("slow", "fast"), (slow, fast), optimizers, strict=True):
            norm = math.sqrt(sum(p.grad.square().sum().item() for p in params))
            assert line[f"grad_norm_{name}"] == pytest.approx(norm, rel=1e-4)
            for p in params:
                p.grad *= min(1.0, 0.5 / norm)
            optimizer.step()
            optimizer.zero_grad()
    for name, params in (("slow", slow), ("fast", fast)):
        for ours, expected in zip(values(session.passes.model, name), params, strict=True):
            torch.testing.assert_close(ours, expected.detach(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_kd_leaves_fast_bitwise_alone_and_moves_slow(make_session, tmp_path, checkpointing):
    """One whole step, dropout on; the teacher differs from the student, so that KD pulls."""
    results = {}
    for weight in (0.0, 5.0):
        cfg, session = make_session(checkpointing, max_steps_per_task=1, kd_lambda=weight)
        model = session.passes.model
        slsd = train_slsd_seq.make_method(cfg, session)
        slsd.read_pool(TASK, session.data[TASK].train)
        randomise(model, seed=7)
        before = values(model, "slow")
        (line,) = run(cfg, session, tmp_path, method=slsd, stage=TASK)
        results[weight] = values(model, "fast"), values(model, "slow"), line
        assert not same(before, results[weight][1])
    (fast, slow, line), (fast_kd, slow_kd, line_kd) = results.values()
    assert same(fast, fast_kd)
    assert not same(slow, slow_kd)
    assert line["kd_loss"] is None and line_kd["kd_loss"] > 0.01
    assert line["loss"] == line_kd["loss"] and line["grad_norm_fast"] == line_kd["grad_norm_fast"]


def test_checkpointing_changes_no_number_and_leaves_the_bottom_out(make_session, tmp_path):
    lines = {}
    for checkpointing in (False, True):
        cfg, session = make_session(checkpointing)
        model = session.passes.model
        calls = []
        for i, layer in enumerate(model.model.layers):
            hook = partial(
                lambda i, calls, m, args: calls.append((i, args[0].requires_grad)), i, calls
            )
            layer.mlp.register_forward_pre_hook(hook)
        lines[checkpointing] = run(cfg, session, tmp_path)
        assert not any(needs_grad for i, needs_grad in calls if i < 2)
        # Recomputed layers run once more in the backward; the frozen ones never do.
        runs = [sum(i == layer for i, _ in calls) for layer in range(4)]
        assert runs[0] == runs[1] and runs[2] == runs[3] == runs[0] * (2 if checkpointing else 1)
    for plain, recomputed in zip(*lines.values(), strict=True):
        assert plain["loss"] == pytest.approx(recomputed["loss"], rel=1e-6)


@pytest.mark.parametrize(
    "other",
    [
        {"tokens_per_pass": 1},
        {"tokens_per_pass": 10_000},
        {"prefix_cache_gib": 0.0},
        {"checkpointing": True},
    ],
)
def test_how_a_step_is_computed_changes_no_result_in_twenty_steps(make_session, tmp_path, other):
    results = []
    for changes in ({}, other):
        options = {"lora_dropout": 0.0, "tokens_per_pass": 64, "num_epochs": 10} | changes
        cfg, session = make_session(max_steps_per_task=20, per_device_batch_size=1, **options)
        model = session.passes.model
        session.passes.keep_prefix(session.data[TASK].train, "frozen layers")
        assert bool(session.passes.prefix.used) == ("prefix_cache_gib" not in changes)
        lines = run(cfg, session, tmp_path)
        held_out = evaluate_loss(session.passes, session.data[TASK].held_out)
        branches = [torch.cat([v.flatten() for v in values(model, b)]) for b in BRANCHES]
        results.append(([line["loss"] for line in lines], held_out, branches))
    (losses, held_out, branches), (other_losses, other_held_out, other_branches) = results
    assert len(losses) == 20 and other_losses == pytest.approx(losses, rel=1e-5)
    assert other_held_out == pytest.approx(held_out, rel=1e-5)
    for ours, expected in zip(other_branches, branches, strict=True):
        assert (ours - expected).norm() <= 1e-4 * expected.norm()


def test_batch_size_and_accumulation_are_one_number(make_session, tmp_path):
    results = []
    for batch, accumulation in ((8, 1), (1, 8)):
        cfg, session = make_session(
            per_device_batch_size=batch, gradient_accumulation_steps=accumulation
        )
        model = session.passes.model
        run(cfg, session, tmp_path)
        results.append(values(model, "fast"))
    assert same(*results)


def test_each_branch_moves_by_its_own_rate(make_session, tmp_path):
    cfg, session = make_session(
        max_steps_per_task=1, lr_slow=1e-4, lr_fast=3e-3, weight_decay=0.0, warmup_ratio=0.0
    )
    model = session.passes.model
    before = {branch: values(model, branch) for branch in ("slow", "fast")}
    run(cfg, session, tmp_path)
    for branch, rate in (("slow", 1e-4), ("fast", 3e-3)):
        pairs = zip(before[branch], values(model, branch), strict=True)
        moves = torch.cat([(new - old).abs().flatten() for old, new in pairs])
        # Adam's first step is the rate itself wherever the gradient is not tiny.
        assert moves.max().item() == pytest.approx(rate, rel=0.01)
        assert moves.median().item() == pytest.approx(rate, rel=0.1)


def test_schedules():
    def multipliers(name, warmup=0.0, total=10):
        return [lr_multiplier(name, warmup, step, total) for step in range(total)]

    assert multipliers("constant") == [1.0] * 10
    assert multipliers("linear") == pytest.approx([1 - i / 10 for i in range(10)])
    assert multipliers("cosine")[5] == pytest.approx(0.5)
    assert multipliers("constant", 0.25)[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    for name in ("constant", "linear", "cosine"):
        for total in (1, 2, 7):
            assert all(0 < m <= 1 for m in multipliers(name, 0.3, total))


def test_steps_are_counted_with_a_partial_last_one(make_config):
    assert count_steps(make_config(num_epochs=3), 17) == (3, 9)
    assert count_steps(make_config(num_epochs=3, max_steps_per_task=4), 17) == (3, 4)


def test_log_windows_are_token_weighted_and_the_last_is_flushed(make_session, tmp_path):
    cfg, session = make_session(num_epochs=2, logging_steps=1)
    steps, cut = [], session.passes.make
    session.passes.make = lambda samples: steps.append(samples) or cut(samples)
    single = run(cfg, session, tmp_path)
    cfg, session = make_session(num_epochs=2, logging_steps=4)
    windows = run(cfg, session, tmp_path)
    assert [line["step"] for line in windows] == [4, 6]
    assert [line["epoch"] for line in windows] == [2, 2]
    tokens = [sum(map(response_tokens, samples)) for samples in steps]
    for window, part in zip(windows, (slice(0, 4), slice(4, 6)), strict=True):
        mean = sum(t * line["loss"] for t, line in zip(tokens[part], single[part], strict=True))
        assert window["loss"] == pytest.approx(mean / sum(tokens[part]), rel=1e-5)


def test_save_load_train_equals_train(make_session, tmp_path):
    cfg, session = make_session()
    run(cfg, session, tmp_path)
    session.journal.save_checkpoint("c")
    run(cfg, session, tmp_path, task="T3_code")

    _, resumed = make_session(new=True)
    load_adapter(resumed.passes.model, Path(cfg.save_dir) / "c")
    run(cfg, resumed, tmp_path, task="T3_code")
    for branch in ("slow", "fast"):
        assert same(values(session.passes.model, branch), values(resumed.passes.model, branch))


def test_the_slow_branch_learns_in_the_first_task(make_session, tmp_path):
    cfg, session = make_session(new=True)
    model = session.passes.model
    run(cfg, session, tmp_path, task="T1_general")
    for layer_B in values(model, "slow")[1::2]:
        assert layer_B.abs().max() > 0


def test_the_base_never_moves(make_session, tmp_path):
    cfg, session = make_session()
    model = session.passes.model
    before = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    run(cfg, session, tmp_path)
    after = dict(model.named_parameters())
    assert all(torch.equal(p, after[n]) for n, p in before.items())


@pytest.mark.parametrize("fast_init", ["continue", "fresh"])
def test_probes_are_read_before_the_fast_branch_is_renewed(make_session, tmp_path, fast_init):
    cfg, session = make_session(fast_init=fast_init, max_steps_per_task=1)
    slsd = train_slsd_seq.make_method(cfg, session)
    with JsonlLog(tmp_path / "log.jsonl") as log:
        assert (
            train_slsd_seq.train_one_task_with_slsd(cfg, session, TASK, log, slsd, "T1_general")
            == 4
        )
    (line,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    # The teacher is the whole last stage: the student is it only where fast goes on.
    assert (abs(line["kd_loss"]) < 1e-4) == (fast_init == "continue")
    assert slsd.buffer is None


def test_a_threshold_that_keeps_nothing_warns_and_trains(make_session, tmp_path, capsys):
    cfg, session = make_session(entropy_threshold=0.01)
    slsd = train_slsd_seq.make_method(cfg, session)
    with JsonlLog(tmp_path / "log.jsonl") as log:
        assert (
            train_slsd_seq.train_one_task_with_slsd(cfg, session, TASK, log, slsd, "T1_general")
            == 0
        )
    assert "warning: T2_math trains without distillation" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(line["kd_loss"] is None for line in lines)


def test_evaluation_is_weighted_by_tokens_and_restores_train_mode(make_session):
    _, session = make_session(lora_dropout=0.5)
    model = session.passes.model
    samples = session.data[TASK].held_out
    model.train()
    result = evaluate_loss(session.passes, samples)
    assert model.training and model.model.layers[2].self_attn.q_proj.dropout.training
    model.eval()
    loss, tokens = mean_loss(model, samples).item(), sum(map(response_tokens, samples))
    assert result == {"loss": pytest.approx(loss, rel=1e-5), "tokens": tokens}


@pytest.mark.parametrize("poisoned", ["loss", "gradient", "kd"])
def test_what_is_not_finite_stops_the_run_before_the_weights(make_session, tmp_path, poisoned):
    cfg, session = make_session()
    model = session.passes.model
    slsd = None
    if poisoned == "loss":
        ids = session.data[TASK].train[3]["input_ids"]
        hook = lambda m, a, out: out.masked_fill(a[0].eq(ids[-3])[..., None], torch.nan)  # noqa: E731
        model.get_input_embeddings().register_forward_hook(hook)
    elif poisoned == "gradient":
        branch_parameters(model, "slow")[0].register_hook(lambda grad: grad * torch.inf)
    else:
        slsd = train_slsd_seq.make_method(cfg, session)
        slsd.read_pool(TASK, session.data[TASK].train)
        slsd.buffer.log_probs[:] = torch.nan
    before = values(model, "slow") + values(model, "fast")
    message = {
        "loss": "the loss is not",
        "gradient": "a gradient is",
        "kd": "the distillation loss",
    }
    with pytest.raises(UserError, match=f"T2_math, step 1: {message[poisoned]}.*float32"):
        run(cfg, session, tmp_path, method=slsd, stage=TASK)
    assert same(before, values(model, "slow") + values(model, "fast"))
    assert Path(tmp_path / "log.jsonl").read_text() == ""


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_train_with_fp32_branches(make_session, tmp_path, base_dtype):
    losses = []
    for dtype in (torch.float32, base_dtype):
        cfg, session = make_session(base_dtype=dtype)
        model = session.passes.model
        slsd = train_slsd_seq.make_method(cfg, session)
        slsd.read_pool(TASK, session.data[TASK].train)
        lines = run(cfg, session, tmp_path, method=slsd, stage=TASK)
        losses.append([line["loss"] for line in lines])
        assert all(p.dtype == torch.float32 for p in branch_parameters(model, "slow"))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_an_overflow_in_float16_is_skipped_and_ten_in_a_row_stop(make_session, tmp_path):
    cfg, session = make_session(base_dtype=torch.float16, num_epochs=5)
    model = session.passes.model
    parameter, steps = branch_parameters(model, "slow")[1], []

    def overflow(grad):
        steps.append(grad)
        return grad * torch.inf if len(steps) == 2 else grad

    handle = parameter.register_hook(overflow)
    before = []
    session.passes.make = partial(
        lambda cut, samples: before.append(values(model, "fast")) or cut(samples),
        session.passes.make,
    )
    lines = run(cfg, session, tmp_path)
    assert lines[1]["grad_norm_slow"] is None and lines[2]["grad_norm_slow"] > 0
    assert same(before[1], before[2]) and not same(before[2], before[3])

    handle.remove()
    parameter.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(UserError, match="step 10: 10 overflows in a row in float16"):
        run(cfg, session, tmp_path)


def test_each_branch_is_clipped_by_its_own_norm():
    model = inject(make_model())
    _, slow, fast = get_ds_lora_param_groups(model, 1, 1, 0)
    for parameter in slow:
        parameter.grad = torch.full_like(parameter, 10.0)
    for parameter in fast:
        parameter.grad = torch.full_like(parameter, 1e-5)
    assert clip_grad_norm(slow, 1.0) > 1 > clip_grad_norm(fast, 1.0)
    assert clip_grad_norm(slow, 0.0).item() == pytest.approx(1.0, rel=1e-4)
    assert all((p.grad == 1e-5).all() for p in fast)
