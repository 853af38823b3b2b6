"""The method's maths against values computed another way, one position at a time."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import inject, make_model, randomise
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from methods.slsd import choose_probes
from models.answers import ProbeBuffer, coarsen, entropy, kd_loss
from models.ds_lora import branch_parameters
from models.forward import (
    cross_entropy,
    dropout_off,
    evaluation,
    picked_log_probs,
    response_logits,
)


def slow_position_kl(teacher, student):
    """KL of one position, class by class, in double precision."""
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    return sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True) if a > 0)


def test_response_logits_are_those_of_the_whole_forward():
    model = randomise(inject(make_model()))
    samples = make_samples([9, 14, 5])
    ((indices, batch, targets),) = passes(samples, 1000)
    with torch.no_grad():
        logits = response_logits(model, **batch)
        parts = [samples[i] for i in indices]
        expected = [
            model(s["input_ids"][None]).logits[0, len(s["labels"]) // 2 - 1 : -1] for s in parts
        ]
    torch.testing.assert_close(logits, torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert targets.tolist() == [t for s in parts for t in s["labels"].tolist() if t != -100]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_picked_log_probs_and_their_gradient_are_those_of_log_softmax(dtype, temperature):
    """300 rows of 9,000: several blocks, the last one short."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(300, 9000)).to(dtype).requires_grad_()
    ids = torch.stack([torch.randperm(9000)[:5] for _ in range(300)])
    weights = torch.randn(300, 5)
    ours = picked_log_probs(logits, ids, temperature)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), logits)
    plain = (logits.double() / temperature).log_softmax(-1).gather(-1, ids)
    (expected,) = torch.autograd.grad((plain * weights).sum(), logits)
    torch.testing.assert_close(ours.double(), plain, atol=1e-5, rtol=1e-5)
    assert gradient.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(gradient, expected, atol=tolerance, rtol=tolerance)


def test_the_gradient_takes_the_place_of_the_logits_and_says_so():
    weight = torch.randn(3, 5, requires_grad=True)
    logits = 2 * weight
    loss = cross_entropy(logits, torch.tensor([0, 1, 2]))
    loss.backward(retain_graph=True)
    torch.testing.assert_close(2 * logits.detach(), weight.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_cross_entropy_by_another_way():
    torch.manual_seed(0)
    logits, targets = torch.randn(7, 50, requires_grad=True), torch.randint(0, 50, (7,))
    loss = cross_entropy(logits, targets)
    expected = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    ours, plain = (torch.autograd.grad(x, logits)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, plain)
    assert cross_entropy(logits[:0], targets[:0]).item() == 0


def test_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1e4, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, -torch.inf]])
    p = torch.tensor([1.0, 2.0, 3.0]).softmax(0)
    expected = [math.log(4), 0.0, -sum(float(x * x.log()) for x in p)]
    torch.testing.assert_close(entropy(logits), torch.tensor(expected))


def test_the_surest_within_the_threshold_come_first():
    entropies = [3.0, 1.0, 2.0, 1.0, 0.5]
    assert choose_probes(entropies, 2.0, 3) == [4, 1, 3]
    assert choose_probes(entropies, 2.0, 99) == [4, 1, 3, 2]
    assert choose_probes(entropies, 0.1, 99) == []


def test_kd_is_the_full_kl_where_k_is_the_vocabulary():
    torch.manual_seed(0)
    teacher, student = torch.randn(5, 11) * 3, torch.randn(5, 11, requires_grad=True)
    for k in (11, 0, 50):
        loss = kd_loss(student, *coarsen(teacher, k))
        expected = sum(map(slow_position_kl, teacher, student.detach()))
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, student.softmax(-1) - teacher.softmax(-1))


def test_kd_of_coarsened_distributions_by_hand():
    torch.manual_seed(1)
    teacher, student = torch.randn(4, 9), torch.randn(4, 9)
    expected = 0.0
    for t, s in zip(teacher.softmax(-1), student.softmax(-1), strict=True):
        kept = t.topk(3).indices.tolist()
        classes = [(float(t[i]), float(s[i])) for i in kept]
        classes.append((1 - sum(p for p, _ in classes), 1 - sum(q for _, q in classes)))
        expected += sum(p * math.log(p / q) for p, q in classes)
    assert float(kd_loss(student, *coarsen(teacher, 3))) == pytest.approx(expected, rel=1e-4)


def test_temperature_is_that_of_hinton():
    torch.manual_seed(2)
    teacher, student = torch.randn(4, 9), torch.randn(4, 9)
    loss = kd_loss(student, *coarsen(teacher, 9, temperature=3.0), temperature=3.0)
    expected = 9 * sum(map(slow_position_kl, teacher / 3, student / 3))
    assert float(loss) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("k", [1, 3, 0])
def test_a_one_hot_teacher_gives_cross_entropy(k):
    teacher = torch.full((2, 6), -torch.inf)
    teacher[:, 4] = 0.0
    student = torch.randn(2, 6, requires_grad=True)
    loss = kd_loss(student, *coarsen(teacher, k))
    loss.backward()
    expected = F.cross_entropy(student.detach(), torch.tensor([4, 4]), reduction="sum")
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - teacher.softmax(-1))


@given(
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    k=st.integers(0, 12),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_kd_is_finite_never_negative_and_zero_for_the_teacher_itself(scale, k, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    teacher = (torch.randn(3, 10, generator=generator) * scale).to(dtype)
    student = (torch.randn(3, 10, generator=generator) * scale).to(dtype).requires_grad_()
    loss = kd_loss(student, *coarsen(teacher, k))
    loss.backward()
    assert torch.isfinite(loss) and loss > -1e-4
    assert torch.isfinite(student.grad).all()
    own = kd_loss(teacher, *coarsen(teacher, k))
    assert abs(float(own)) < 1e-4


def test_eval_mode_and_dropout_come_back_even_after_a_fault():
    model = inject(make_model(), dropout=0.5).train()
    model.model.layers[0].eval()
    before = {name: m.training for name, m in model.named_modules()}
    for context in (evaluation, dropout_off):
        with pytest.raises(KeyError), context(model):
            modes = {type(m).__name__: m.training for m in model.modules()}
            assert not modes["Dropout"]
            assert modes["LlamaForCausalLM"] == (context is dropout_off)
            raise KeyError
        assert {name: m.training for name, m in model.named_modules()} == before


def test_the_buffer_holds_the_surest_samples_with_the_models_own_answers():
    model = randomise(inject(make_model(), dropout=0.5)).train()
    samples = make_samples([12, 7, 20, 9, 15, 11, 8, 10])
    slsd = make_slsd(model, top_k=0)
    slsd.begin_task("T", samples)
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
        slsd = make_slsd(model)
        slsd.make_passes = lambda s, size=size: passes(s, size)
        slsd.begin_task("T", samples)
        buffers.append(slsd.buffer)
    for other in buffers[1:]:
        assert torch.equal(buffers[0].sample_ids, other.sample_ids)
        torch.testing.assert_close(buffers[0].log_tail, other.log_tail, atol=1e-4, rtol=1e-4)


def test_a_buffer_survives_the_disk(tmp_path):
    slsd = make_slsd(inject(make_model()))
    slsd.begin_task("T", make_samples([12, 7, 20, 9]))
    path = tmp_path / "probes.safetensors"
    save_file(slsd.state(), path)
    other = make_slsd(inject(make_model()))
    other.restore(load_file(path))
    loaded = other.buffer
    for name in ProbeBuffer.__dataclass_fields__:
        assert torch.equal(getattr(loaded, name), getattr(slsd.buffer, name))
    assert torch.equal(loaded[1]["labels"], slsd.buffer[1]["labels"])


def test_kd_is_nearly_zero_before_the_first_step_and_spares_the_fast_branch():
    model = randomise(inject(make_model(), dropout=0.3)).train()
    slsd = make_slsd(model)
    slsd.begin_task("T", make_samples([12, 7, 20, 9, 15]))
    kl, tokens = slsd.aux_backward(0, lambda loss: loss.backward())
    assert abs(float(kl)) / tokens < 1e-4
    assert all(p.grad is None for p in branch_parameters(model, "fast"))
    assert all(p.grad is not None for p in branch_parameters(model, "slow"))


def test_the_slow_gradient_is_that_of_the_mean_kl_over_the_steps_probes():
    model = randomise(inject(make_model())).train()
    slsd = make_slsd(model, weight=0.7, batch_size=3, top_k=0)
    slsd.begin_task("T", make_samples([12, 7, 20, 9, 15]))
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
    slsd = make_slsd(model, every=2, batch_size=3)
    slsd.begin_task("T", make_samples([12, 7, 20, 9, 15]))
    seen = []
    slsd.make_passes = lambda samples: seen.append([s["id"] for s in samples]) or passes(samples)
    due = [slsd.aux_backward(step, lambda loss: loss.backward()) is not None for step in range(8)]
    assert due == [True, False] * 4
    order = [sample["id"] for sample in slsd.auxiliary_samples()]
    assert sorted(order) == sorted(sample["id"] for sample in slsd.buffer)
    assert sum(seen, []) == order * 3
    slsd.end_task("T", [])
    assert slsd.aux_backward(0, None) is None


def test_no_sample_sure_enough_means_no_buffer():
    slsd = make_slsd(inject(make_model()), threshold=0.0)
    slsd.begin_task("T", make_samples([12, 7]))
    assert slsd.buffer is None and min(slsd.pool_entropies) > 0
    assert slsd.aux_backward(0, None) is None
