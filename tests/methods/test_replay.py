"""Replay: what is kept, and the gradient of what is learned again."""

import torch
from helpers import (
    inject,
    make_method,
    make_model,
    make_samples,
    mean_loss,
    parameters,
    passes,
    randomise,
)


def test_replay_learns_kept_samples_of_earlier_tasks_again():
    model = randomise(inject(make_model()))
    old, older = make_samples([12, 7, 20, 9], seed=1), make_samples([8, 6], seed=2)
    settings = {"memory_per_task": 0.5, "memory_batch_size": 2}
    replay = make_method("replay", model, **settings)
    assert replay.aux_backward(0, None) is None
    replay.end_task("T1", older, False)
    replay.end_task("T2", old, False)
    assert len(replay.samples) == 3
    kept = [sample["input_ids"].tolist() for sample in replay.samples]
    assert all(ids in [s["input_ids"].tolist() for s in [*old, *older]] for ids in kept)
    seen = []
    replay.tools.make_passes = lambda samples: seen.extend(samples) or passes(samples)
    replay.aux_backward(5, lambda loss: loss.backward())
    assert len(seen) == 2
    expected = torch.autograd.grad(mean_loss(model, seen), parameters(model))
    for parameter, gradient in zip(parameters(model), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)
    other = make_method("replay", model, **settings)
    other.restore(replay.state())
    assert [s["id"] for s in other.samples] == [s["id"] for s in replay.samples]
    assert all(
        torch.equal(a[key], b[key])
        for a, b in zip(other.samples, replay.samples, strict=True)
        for key in ("input_ids", "labels")
    )
