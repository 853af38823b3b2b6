"""The fold of fast into slow, against least squares and by its limits."""

import numpy as np
import pytest
import torch
from helpers import alone, inject, make_model, make_samples, passes, randomise
from peft import PeftModel

from models.adapter import load_adapter, save_adapter
from models.consolidation import Consolidation, cut_rank, gated, gram_matrices
from models.ds_lora import branches_restored, ds_lora_layers
from models.forward import evaluation, response_logits


def test_the_gate_solves_the_least_squares_of_old_and_new_inputs():
    """min |(D - 0) x|^2 over old + |(D - F) x|^2 over new, by another solver."""
    rng = np.random.default_rng(0)
    old, new = rng.normal(size=(200, 12)), rng.normal(size=(150, 12)) * np.linspace(0.1, 3, 12)
    A, B, c, ridge = rng.normal(size=(4, 12)), rng.normal(size=(7, 4)), 0.3, 1e-3
    gram = {"old": old.T @ old / 200, "new": new.T @ new / 150}
    total = c * gram["old"] + gram["new"]
    damping = np.sqrt(ridge * np.mean(np.diag(total))) * np.eye(12)
    inputs = np.concatenate([np.sqrt(c / 200) * old, new / np.sqrt(150), damping])
    wanted = np.concatenate([np.zeros((200, 7)), new / np.sqrt(150) @ (B @ A).T, np.zeros((12, 7))])
    expected = np.linalg.lstsq(inputs, wanted, rcond=None)[0].T
    as_tensors = (torch.tensor(gram[name]).float() for name in ("new", "old"))
    found = gated(torch.tensor(A), *as_tensors, c, ridge)
    np.testing.assert_allclose(B @ found.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_inputs_that_never_meet_keep_the_old_bitwise_and_get_the_new_exactly():
    A = torch.randn(4, 10, dtype=torch.float64)
    old, new = torch.zeros(10, 10), torch.zeros(10, 10)
    old[:5, :5] = torch.eye(5) * 2
    new[5:, 5:] = torch.diag(torch.arange(1.0, 6.0))
    folded = gated(A, new, old, c=1.0, ridge=1e-12)
    assert torch.equal(folded[:, :5], torch.zeros(4, 5, dtype=torch.float64))
    torch.testing.assert_close(folded[:, 5:], A[:, 5:], rtol=1e-10, atol=0)


def test_the_first_task_is_folded_unchanged_and_fast_is_silent():
    model = randomise(inject(make_model()))
    for layer in ds_lora_layers(model).values():
        torch.nn.init.zeros_(layer.lora_B_slow)
    samples = make_samples([9, 14, 5])
    (_, batch, _), *_ = passes(samples, 1000)
    with evaluation(model):
        before = response_logits(model, **batch)
        Consolidation(model, 0.3, 1e-3).fold(
            *gram_matrices(model, passes, samples, alone, lambda tensor: tensor)
        )
        torch.testing.assert_close(response_logits(model, **batch), before, rtol=1e-5, atol=1e-6)
    assert all(not layer.lora_B_fast.any() for layer in ds_lora_layers(model).values())


def test_gram_matrices_are_the_mean_outer_product_of_every_real_token():
    model = randomise(inject(make_model(), dropout=0.5)).train()
    samples, seen = make_samples([9, 14, 5]), {}
    found, owners = gram_matrices(model, passes, samples, alone, lambda tensor: tensor)
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, n=n: seen.setdefault(n, []).append(args[0]))
        for n, layer in ds_lora_layers(model).items()
    ]
    with evaluation(model):
        for sample in samples:
            model(sample["input_ids"][None])
    for hook in hooks:
        hook.remove()
    assert model.training and len(found) == len(seen) // 2  # q and v share theirs
    for name, inputs in seen.items():
        x = torch.cat([each[0] for each in inputs]).double()
        gram = found[owners[name]]
        assert torch.equal(gram, gram.T) and gram.dtype == torch.float32
        torch.testing.assert_close(gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("limit", "ranks"), [(0, [4, 8, 12]), (8, [4, 8, 8])])
def test_slow_grows_by_a_rank_a_task_up_to_the_limit(limit, ranks):
    model = randomise(inject(make_model()))
    consolidation = Consolidation(model, 1.0, 1e-3, rank=limit)
    for task, rank in enumerate(ranks):
        samples = make_samples([9, 14, 5], seed=task)
        consolidation.fold(*gram_matrices(model, passes, samples, alone, lambda tensor: tensor))
        assert {len(layer.lora_A_slow) for layer in ds_lora_layers(model).values()} == {rank}
        for layer in ds_lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B_fast)


@pytest.mark.parametrize("rank", [2, 5])
def test_the_cut_is_the_best_of_its_rank_in_the_metric(rank):
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(*shape, generator=generator).double() for shape in ((6, 9), (8, 6)))
    x = torch.randn(50, 9, generator=generator).double() * torch.linspace(0.01, 3, 9)
    new_A, new_B = cut_rank(A, B, x.T @ x / 50, rank, ridge=1e-12)
    error = torch.linalg.norm(x @ (B @ A - new_B @ new_A).T)
    u, s, v = torch.linalg.svd(x @ (B @ A).T, full_matrices=False)
    best = torch.linalg.norm(s[rank:])
    torch.testing.assert_close(error, best, rtol=1e-6, atol=1e-9)


def test_peft_reads_a_grown_slow_branch_and_so_does_the_model(tmp_path):
    model = randomise(inject(make_model()))
    consolidation = Consolidation(model, 1.0, 1e-3)
    for task in range(2):
        randomise(model, seed=task)
        samples = make_samples([9, 14], seed=task)
        consolidation.fold(*gram_matrices(model, passes, samples, alone, lambda tensor: tensor))
    randomise(model, seed=9)
    save_adapter(model, tmp_path, "tiny")
    ids = torch.arange(3, 20)[None]
    peft = PeftModel.from_pretrained(make_model(), tmp_path)
    other = inject(make_model())
    load_adapter(other, tmp_path)
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(peft(ids).logits, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(other(ids).logits, expected)
    with branches_restored(other):
        load_adapter(other, tmp_path, ("fast",))
        assert {len(layer.lora_A_slow) for layer in ds_lora_layers(other).values()} == {8}


def test_the_state_comes_back():
    model = randomise(inject(make_model()))
    first, second = Consolidation(model, 1.0, 1e-3), Consolidation(model, 1.0, 1e-3)
    grams = gram_matrices(model, passes, make_samples([9]), alone, lambda tensor: tensor)
    first.fold(*grams)
    second.restore(first.state())
    assert first.grams.keys() == second.grams.keys()
    assert all(torch.equal(first.grams[name], second.grams[name]) for name in first.grams)
