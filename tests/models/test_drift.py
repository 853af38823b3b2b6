"""Drift against the KL of one position at a time."""

import math

import pytest
from helpers import alone, inject, make_model, make_samples, passes, randomise

from models.drift import Drift


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
