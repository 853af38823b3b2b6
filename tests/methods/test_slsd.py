"""The probes, and what distilling them moves, against values computed another way."""

import pytest
import torch
import torch.nn.functional as F
from helpers import errors, inject, make_method, make_model, make_samples, passes, randomise
from safetensors.torch import load_file, save_file

import train_slsd_seq
from methods.slsd import choose_probes
from models.answers import ProbeBuffer, entropy
from models.ds_lora import branch_parameters


def test_the_surest_within_the_threshold_come_first():
    entropies = [3.0, 1.0, 2.0, 1.0, 0.5]
    assert choose_probes(entropies, 2.0, 3) == [4, 1, 3]
    assert choose_probes(entropies, 2.0, 99) == [4, 1, 3, 2]
    assert choose_probes(entropies, 0.1, 99) == []


def test_the_buffer_holds_the_surest_samples_with_the_models_own_answers():
    model = randomise(inject(make_model(), dropout=0.5)).train()
    samples = make_samples([12, 7, 20, 9, 15, 11, 8, 10])
    slsd = make_method("ds_lora", model, kd_top_k=0)
    slsd.read_pool("T", samples)
    model.eval()
    surest = {}
    with torch.no_grad():
        for s in samples:
            logits = model(s["input_ids"][None]).logits[0, len(s["labels"]) // 2 - 1 : -1]
            surest[s["id"]] = (float(entropy(logits).mean()), logits.log_softmax(-1))
    chosen = [slsd.buffer[i]["id"] for i in range(len(slsd.buffer))]
    assert set(chosen) == set(sorted(surest, key=lambda s: surest[s][0])[:4])
    by_id = {s["id"]: s for s in samples}
    for i, sample_id in enumerate(chosen):
        for key in ("input_ids", "labels"):
            assert torch.equal(slsd.buffer[i][key], by_id[sample_id][key])
        log_probs, ids, log_tail = slsd.buffer.answers(i)
        expected = surest[sample_id][1].gather(-1, ids)
        torch.testing.assert_close(log_probs, expected, atol=0.02, rtol=1e-3)
        assert (log_tail == -torch.inf).all()
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(len(ids)))


def test_the_probes_do_not_depend_on_passes():
    model = randomise(inject(make_model()))
    samples = make_samples([12, 7, 20, 9, 15, 11, 8, 10])
    buffers = []
    for size in (1, 40, 10_000):
        slsd = make_method("ds_lora", model)
        slsd.tools.make_passes = lambda s, size=size: passes(s, size)
        slsd.read_pool("T", samples)
        buffers.append(slsd.buffer)
    for other in buffers[1:]:
        assert torch.equal(buffers[0].sample_ids, other.sample_ids)
        torch.testing.assert_close(buffers[0].log_tail, other.log_tail, atol=1e-4, rtol=1e-4)


def test_a_buffer_survives_the_disk(tmp_path):
    slsd = make_method("ds_lora", inject(make_model()))
    slsd.read_pool("T", make_samples([12, 7, 20, 9]))
    path = tmp_path / "probes.safetensors"
    save_file(slsd.state(), path)
    other = make_method("ds_lora", inject(make_model()))
    other.restore(load_file(path))
    loaded = other.buffer
    for name in ProbeBuffer.__dataclass_fields__:
        assert torch.equal(getattr(loaded, name), getattr(slsd.buffer, name))
    assert torch.equal(loaded[1]["labels"], slsd.buffer[1]["labels"])


def test_kd_is_nearly_zero_before_the_first_step_and_spares_the_fast_branch():
    model = randomise(inject(make_model(), dropout=0.3)).train()
    slsd = make_method("ds_lora", model)
    slsd.read_pool("T", make_samples([12, 7, 20, 9, 15]))
    kl, tokens = slsd.aux_backward(0, lambda loss: loss.backward())
    assert abs(float(kl)) / tokens < 1e-4
    assert all(p.grad is None for p in branch_parameters(model, "fast"))
    assert all(p.grad is not None for p in branch_parameters(model, "slow"))


def test_the_slow_gradient_is_that_of_the_mean_kl_over_the_steps_probes():
    model = randomise(inject(make_model())).train()
    slsd = make_method("ds_lora", model, kd_lambda=0.7, kd_batch_size=3, kd_top_k=0)
    slsd.read_pool("T", make_samples([12, 7, 20, 9, 15]))
    randomise(model, seed=5)
    slow = branch_parameters(model, "slow")
    kl, tokens = slsd.aux_backward(0, lambda loss: loss.backward())
    total, count = torch.zeros(()), 0
    places = {sample["id"]: i for i, sample in enumerate(slsd.buffer)}
    for sample in slsd.auxiliary_samples()[:3]:
        i = places[sample["id"]]
        logits = model(sample["input_ids"][None]).logits[0]
        log_probs, ids, _ = slsd.buffer.answers(i)
        teacher = torch.zeros(len(ids), 320).scatter(-1, ids, log_probs.exp())
        start = len(logits) - len(ids) - 1
        total += F.kl_div(logits[start:-1].log_softmax(-1), teacher, reduction="sum")
        count += len(ids)
    assert tokens == count and kl.item() == pytest.approx(total.item(), rel=1e-4)
    expected = torch.autograd.grad(0.7 * total / count, slow)
    for parameter, gradient in zip(slow, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-3)


def test_distillation_is_due_every_so_many_steps_and_reads_the_buffer_round_and_round():
    model = inject(make_model())
    slsd = make_method("ds_lora", model, kd_every=2, kd_batch_size=3)
    slsd.read_pool("T", make_samples([12, 7, 20, 9, 15]))
    seen = []

    def cut(samples):
        seen.append([sample["id"] for sample in samples])
        return passes(samples)

    slsd.tools.make_passes = cut
    due = [slsd.aux_backward(step, lambda loss: loss.backward()) is not None for step in range(8)]
    assert due == [True, False] * 4
    order = [sample["id"] for sample in slsd.auxiliary_samples()]
    assert sorted(order) == sorted(sample["id"] for sample in slsd.buffer)
    assert sum(seen, []) == order * 3
    slsd.end_task("T", [], False)
    assert slsd.aux_backward(0, None) is None


def test_no_sample_sure_enough_means_no_buffer():
    slsd = make_method("ds_lora", inject(make_model()), entropy_threshold=0.0)
    slsd.read_pool("T", make_samples([12, 7]))
    assert slsd.buffer is None and min(slsd.pool_entropies) > 0
    assert slsd.aux_backward(0, None) is None


def test_kd_flags_move_what_they_say():
    """Branches and forward; the slow branch alone is a student that differs from its teacher."""
    found = {}
    for name, changes in {
        "specified": {},
        "all": {"kd_branches": "all"},
        "slow forward": {"kd_forward": "slow"},
    }.items():
        model = randomise(inject(make_model()))
        slsd = make_method("ds_lora", model, kd_top_k=0, **changes)
        slsd.read_pool("T", make_samples([12, 7, 20, 9]))
        randomise(model, seed=3)
        kl, tokens = slsd.aux_backward(0, lambda loss: loss.backward())
        has = [p.grad is not None for p in branch_parameters(model, "fast")]
        assert all(has) == any(has) == (name == "all")
        found[name] = float(kl) / tokens
    assert found["specified"] == found["all"] != found["slow forward"]


def test_random_probes_are_not_the_surest_and_are_read_alone():
    model, samples = randomise(inject(make_model())), make_samples([12, 7, 20, 9, 15, 11, 8, 10])
    slsd = make_method("ds_lora", model, probe_choice="random", entropy_threshold=0.0)
    slsd.read_pool("T", samples)
    assert len(slsd.buffer) == len(slsd.pool_entropies) == 4


def test_replayed_probes_carry_the_answers_of_the_model_that_had_learned_them():
    model = randomise(inject(make_model()))
    first, second = make_samples([12, 7, 20], seed=1), make_samples([9, 15], seed=2)
    slsd = make_method("ds_lora", model, kd_probes="replay", kd_top_k=0, kd_batch_size=9)
    slsd.end_task("T1", first, False)
    assert len(slsd.earlier) == 1 and slsd.buffer is None
    slsd.read_pool("T2", second)
    assert len(slsd.auxiliary_samples()) == 5
    kl, tokens = slsd.aux_backward(0, lambda loss: loss.backward())
    assert float(kl) / tokens < 1e-4
    randomise(model, seed=3)
    slsd.end_task("T2", second, False)
    now = slsd.earlier[1]
    ids = {sample["id"]: sample for sample in second}
    for i, sample in enumerate(now):
        plain = model(ids[sample["id"]]["input_ids"][None]).logits[0, :-1]
        start = len(plain) - int(now.response_lengths[i])
        log_probs, classes, _ = now.answers(i)
        expected = plain[start:].log_softmax(-1).gather(-1, classes)
        torch.testing.assert_close(log_probs, expected.detach(), atol=0.02, rtol=1e-2)
    other = make_method("ds_lora", model, kd_probes="replay", kd_top_k=0, kd_batch_size=9)
    other.restore(slsd.state())
    assert [s["id"] for s in other.auxiliary_samples()] == [
        s["id"] for s in slsd.auxiliary_samples()
    ]


def test_the_slow_branch_alone_cannot_teach_the_fast_one(flags, capsys):
    assert train_slsd_seq.main(flags(kd_forward="slow", kd_branches="all")) == 2
    assert "give --kd_branches slow" in errors(capsys)[0]
