"""How samples are cut into passes."""

import math

import pytest
import torch
from helpers import make_rows

from models.forward import IGNORE
from training.passes import PASS_COST, cut_lengths, make_passes
from utils_data import InstructionDataset


@pytest.mark.parametrize("shares", [1, 3])
@pytest.mark.parametrize("budget", [1, 100, 10**6])
def test_passes_hold_every_sample_once_within_the_budget(tokenizer, budget, shares):
    rows = [{**row, "input": "x " * (7 * i % 40)} for i, row in enumerate(make_rows("T1", 50))]
    data = InstructionDataset(rows, tokenizer, 128)
    seen, tokens = [], []
    for share in range(shares):
        longest = 10**9
        cut = make_passes(data, budget, 2, torch.device("cpu"), (share, shares))
        tokens.append(0)
        for indices, batch, targets in cut:
            seen += indices
            size = batch["input_ids"].numel()
            assert size <= budget or len(indices) == 1
            assert batch["input_ids"].shape[1] <= longest
            longest = batch["input_ids"].shape[1]
            expected = []
            for i, ids in zip(indices, batch["input_ids"], strict=True):
                assert torch.equal(ids[: data.lengths[i]], data[i]["input_ids"])
                expected += [t for t in data[i]["labels"].tolist() if t != IGNORE]
            assert targets.tolist() == expected
            following = batch["input_ids"].flatten()[batch["positions"] + 1]
            assert torch.equal(following, targets)
            tokens[-1] += sum(data.lengths[i] for i in indices)
    assert sorted(seen) == list(range(50))
    assert max(tokens) - min(tokens) <= 128


@pytest.mark.parametrize("budget", [1, 60, 10**6])
def test_passes_cost_least(budget):
    """Against every way to cut eight samples."""
    samples = [
        {"input_ids": torch.ones(n, dtype=torch.long), "labels": torch.ones(n, dtype=torch.long)}
        for n in (3, 90, 4, 30, 31, 95, 29, 2)
    ]
    lengths = sorted((len(s["input_ids"]) for s in samples), reverse=True)

    def cost(sizes):
        total, start = 0, 0
        for size in sizes:
            if size > 1 and size * lengths[start] > budget:
                return math.inf
            total += size * lengths[start] + PASS_COST["cpu"]
            start += size
        return total

    def ways(n):
        yield from ([size, *rest] for size in range(1, n + 1) for rest in ways(n - size))
        if n == 0:
            yield []

    sizes = [len(i) for i, *_ in make_passes(samples, budget, 0, torch.device("cpu"))]
    assert cost(sizes) == min(map(cost, ways(len(samples))))


def test_a_gpu_takes_larger_passes():
    """A pass costs a GPU as much as 512 tokens, a CPU as 64."""
    cut = {kind: [*cut_lengths([600, 300], 2048, cost)] for kind, cost in PASS_COST.items()}
    assert cut == {"cpu": [(0, 1), (1, 2)], "cuda": [(0, 2)]}
