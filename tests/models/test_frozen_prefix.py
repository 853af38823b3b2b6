"""The upper layers alone, from kept hidden states, are the plain model: logits, gradients, runs."""

from functools import partial

import pytest
import torch
import transformers
from helpers import inject, make_model, make_samples, randomise

from models.adapter import load_adapter, save_adapter
from models.ds_lora import branch_parameters
from models.forward import response_logits
from models.frozen_prefix import FrozenPrefix
from training.passes import make_passes
from training.session import enable_checkpointing

FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 5, "attn_implementation": "eager"},
}


def make_family(family, **changes):
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    config = getattr(transformers, f"{family}Config")(
        **sizes, **heads, **{**FAMILIES[family], **changes}
    )
    torch.manual_seed(0)
    return randomise(inject(getattr(transformers, f"{family}ForCausalLM")(config)))


def one_pass(lengths=(20, 9, 14)):
    samples = make_samples(lengths)
    ((indices, batch, targets),) = make_passes(samples, 10**6, 2, torch.device("cpu"))
    return [samples[i] for i in indices], batch, targets


@pytest.fixture(autouse=True)
def no_padding_limit(monkeypatch):
    monkeypatch.setattr("training.passes.PASS_COST", {"cpu": 10**6})


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_plain_model(family, checkpointing):
    model = make_family(family).train()
    if checkpointing:
        enable_checkpointing(model)
    samples, batch, targets = one_pass()
    prefix = FrozenPrefix(model, 2, 10**9)
    assert prefix.keep(samples, batch) == [sample["id"] for sample in samples]
    layers = list(model.model.layers)
    calls = []
    layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    results = []
    for start in (None, prefix.start(samples, batch)):
        logits = response_logits(model, **batch, **({"start": start} if start else {}))
        torch.nn.functional.cross_entropy(logits, targets).backward()
        results.append((logits.detach(), [p.grad for p in branch_parameters(model, "slow")]))
        model.zero_grad()
    (plain, plain_grads), (ours, grads) = results
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    for ours, expected in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    assert len(calls) == 1 and list(model.model.layers) == layers


def test_rows_kept_and_not_kept_share_a_pass():
    model = make_family("Llama")
    samples, batch, _ = one_pass()
    prefix = FrozenPrefix(model, 2, 10**9)
    assert prefix.start(samples, batch) is None
    prefix.keep(samples, batch)
    prefix.drop([samples[1]["id"]])
    start = prefix.start(samples, batch)
    with torch.no_grad():
        plain, ours = (response_logits(model, **batch, **k) for k in ({}, {"start": start}))
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_room_is_never_exceeded_and_comes_back():
    model = make_family("Llama")
    samples, batch, _ = one_pass()
    needed = sum(len(s["input_ids"]) for s in samples) * 32 * 4
    prefix = FrozenPrefix(model, 2, needed + 100)
    kept = prefix.keep(samples, batch)
    assert prefix.used == needed
    more = make_samples([20, 9], seed=3)
    for i, sample in enumerate(more):
        sample["id"] = f"{i + 100:064x}"
    ((_, other, _),) = make_passes(more, 10**6, 2, torch.device("cpu"))
    assert prefix.keep(more, other) == []
    prefix.drop(kept)
    assert prefix.used == 0 and prefix.keep(more, other) == [s["id"] for s in more]
    assert FrozenPrefix(model, 0, 10**9).keep(samples, batch) == []
    assert FrozenPrefix(model, 2, 0).keep(samples, batch) == []


def test_it_is_computed_without_dropout_and_without_a_graph():
    model = make_family("Qwen2", attention_dropout=0.5).train()
    samples, batch, _ = one_pass()
    prefix = FrozenPrefix(model, 2, 10**9)
    prefix.keep(samples, batch)
    first = [prefix._kept[sample["id"]] for sample in samples]
    assert model.training and not first[0].requires_grad
    again = FrozenPrefix(model, 2, 10**9)
    again.keep(samples, batch)
    assert all(map(torch.equal, first, (again._kept[sample["id"]] for sample in samples)))


def test_a_checkpoint_of_the_same_base_keeps_it(tmp_path):
    model = make_family("Llama")
    samples, batch, _ = one_pass()
    prefix = FrozenPrefix(model, 2, 10**9)
    prefix.keep(samples, batch)
    save_adapter(make_family("Llama"), tmp_path, "tiny")
    randomise(model, seed=9)
    load_adapter(model, tmp_path)
    with torch.no_grad():
        start = prefix.start(samples, batch)
        plain, ours = (response_logits(model, **batch, **k) for k in ({}, {"start": start}))
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_a_family_whose_upper_layers_alone_differ_is_found():
    """Here the top layer reads the embeddings, which a run from the middle does not have."""
    model = inject(make_model())
    seen = []

    def remember_embeddings(_, args):
        seen[:] = [args[0]]

    def add_embeddings(_, args):
        return (args[0] + seen.pop(), *args[1:]) if seen else None

    model.model.layers[0].register_forward_pre_hook(remember_embeddings)
    model.model.layers[3].register_forward_pre_hook(add_embeddings)
    samples, batch, _ = one_pass()
    prefix = FrozenPrefix(model, 2, 10**9)
    with pytest.raises(ValueError, match="upper layers alone differ"):
        prefix.keep(samples, batch)


def test_the_layers_come_back_after_a_fault():
    model = make_family("Llama")
    samples, batch, _ = one_pass()
    prefix = FrozenPrefix(model, 2, 10**9)
    layers = list(model.model.layers)
    hidden = prefix.run_bottom(batch["input_ids"])
    with pytest.raises(KeyError), partial(prefix.resumed, hidden)():
        raise KeyError
    with pytest.raises(IndexError):
        prefix.run_bottom(torch.full((1, 4), 10**6))
    assert list(model.model.layers) == layers


def test_rows_of_the_same_text_are_kept_once():
    model = inject(make_model())
    (sample,) = make_samples([9])
    prefix = FrozenPrefix(model, 2, 10**6)
    ids = torch.stack([sample["input_ids"]] * 2)
    kept = prefix.keep([sample, sample], {"input_ids": ids, "positions": torch.tensor([3])})
    assert kept == [sample["id"]] and prefix.used == 9 * 32 * 4
    prefix.drop(kept)
    assert prefix.used == 0
