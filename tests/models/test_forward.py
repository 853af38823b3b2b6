"""The response's logits, its cross entropy and the modes of a model, against plain ways."""

import pytest
import torch
import torch.nn.functional as F
from helpers import inject, make_model, make_samples, passes, randomise

from models.forward import (
    IGNORE,
    cross_entropy,
    dropout_off,
    evaluation,
    picked_log_probs,
    response_logits,
    response_tokens,
)


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
    assert targets.tolist() == [t for s in parts for t in s["labels"].tolist() if t != IGNORE]
    assert [response_tokens(s) for s in samples] == [5, 7, 3]


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
