"""EWC: the Fisher and the penalty against sums by hand."""

import pytest
import torch
from helpers import (
    inject,
    make_method,
    make_model,
    make_samples,
    mean_loss,
    parameters,
    randomise,
)

from models.forward import response_tokens


def test_ewc_penalises_by_the_fisher_of_each_task_and_the_last_end():
    model = randomise(inject(make_model(), dropout=0.4)).train()
    tasks = [make_samples([12, 7], seed=1), make_samples([9], seed=2)]
    settings = {"ewc_lambda": 3.0, "fisher_samples": 100}
    ewc = make_method("ewc", model, **settings)
    ewc.aux_backward(0, None)
    fisher = [torch.zeros_like(p) for p in parameters(model)]
    for name, samples in zip("ab", tasks, strict=True):
        model.eval()
        tokens = sum(map(response_tokens, samples))
        for sample in samples:
            length = response_tokens(sample)
            loss = mean_loss(model, [sample]) * length
            for total, gradient in zip(
                fisher, torch.autograd.grad(loss, parameters(model)), strict=True
            ):
                total += gradient**2 / tokens
        model.train()
        ewc.end_task(name, samples, False)
    assert model.training
    # No task follows: its Fisher would be for nothing.
    ewc.end_task("c", tasks[0], True)
    for ours, expected in zip(ewc.anchor.fisher, fisher, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-3)
    anchor = [p.detach().clone() for p in parameters(model)]
    assert ewc.anchor.penalty().item() == 0
    randomise(model, seed=9)
    moved = zip(fisher, parameters(model), anchor, strict=True)
    by_hand = sum(float((f * (p.detach() - a).square()).sum()) for f, p, a in moved) / 2
    assert ewc.anchor.penalty().item() == pytest.approx(by_hand, rel=1e-3)
    ewc.aux_backward(0, lambda loss: loss.backward())
    for f, p, a in zip(fisher, parameters(model), anchor, strict=True):
        torch.testing.assert_close(p.grad, 3.0 * f * (p - a).detach(), atol=1e-5, rtol=1e-3)
    other = make_method("ewc", model, **settings)
    other.restore(ewc.state())
    assert other.anchor.penalty().item() == ewc.anchor.penalty().item()
