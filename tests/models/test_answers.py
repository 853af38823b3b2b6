"""Answers and the divergence from them, against values computed one position at a time."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from models.answers import coarsen, entropy, kd_loss, kl_divergence


def slow_position_kl(teacher, student):
    """KL of one position, class by class, in double precision."""
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    return sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True) if a > 0)


def test_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1e4, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, -torch.inf]])
    p = torch.tensor([1.0, 2.0, 3.0]).softmax(0)
    expected = [math.log(4), 0.0, -sum(float(x * x.log()) for x in p)]
    torch.testing.assert_close(entropy(logits), torch.tensor(expected))


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


def test_kl_by_position_is_not_below_zero_and_zero_for_itself():
    torch.manual_seed(0)
    logits = torch.randn(6, 40)
    top = logits.log_softmax(-1).topk(8)
    tail = torch.log1p(-top.values.exp().sum(-1))
    assert kl_divergence(logits, top.values, top.indices, tail).abs().max() < 1e-5
    assert (kl_divergence(torch.randn(6, 40), top.values, top.indices, tail) > 0).all()
