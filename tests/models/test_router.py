"""Routing by what the frozen layers make of a prompt, and the reading that uses it."""

import json

import numpy as np
import pytest
import torch
from helpers import inject, make_model, make_samples, randomise, read

import train_slsd_seq
from models.frozen_prefix import FrozenPrefix
from models.router import SHRINKAGE, Router, prompt_feature


def clouds(number, width=12, seed=0):
    """Three Gaussian classes with one covariance, far from a multiple of the identity."""
    draw = np.random.default_rng(seed)
    scales = np.exp(draw.normal(size=width) * 2)
    mix = draw.normal(size=(width, width)) / width**0.5
    centres = np.random.default_rng(5).normal(size=(3, width)) * 3
    return [
        torch.tensor((draw.normal(size=(number, width)) + c) @ mix * scales, dtype=torch.float32)
        for c in centres
    ]


def test_distances_are_those_of_a_shrunk_pooled_covariance():
    classes = clouds(40)
    router = Router()
    for name, rows in zip("abc", classes, strict=True):
        router.add(name, rows)
    arrays = [rows.double().numpy() for rows in classes]
    centred = np.concatenate([a - a.mean(0) for a in arrays])
    S = centred.T @ centred / len(centred)
    inverse = np.linalg.inv((1 - SHRINKAGE) * S + SHRINKAGE * np.diag(np.diag(S)))
    x = arrays[1][:5]
    expected = np.stack(
        [np.einsum("ni,ij,nj->n", x - a.mean(0), inverse, x - a.mean(0)) for a in arrays], 1
    )
    found = router.distances(classes[1][:5]).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert router.route(classes[2]) == ["c"] * 40


def test_the_order_of_tasks_does_not_matter_and_a_state_is_whole():
    classes = dict(zip("abc", clouds(7), strict=True))
    routers = []
    for order in ("abc", "cab"):
        router = Router()
        for name in order:
            # Through its state after each task, as it lies in the stage checkpoints.
            other = Router()
            other.restore(router.state())
            other.add(name, classes[name])
            router = other
        assert router.factor.shape == (12, 12)
        routers.append(router)
    x = torch.cat(list(classes.values()))
    first, second = (r.distances(x)[:, [r.tasks.index(n) for n in "abc"]] for r in routers)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)


def test_the_feature_is_of_the_prompt_alone_and_of_directions():
    hidden = torch.randn(9, 16)
    feature = prompt_feature(hidden, 5)
    hidden[5:] = 0
    hidden[0] *= 1000
    torch.testing.assert_close(prompt_feature(hidden.half().float(), 5), feature, atol=2e-3, rtol=0)


def test_the_frozen_output_is_the_same_kept_or_not_whatever_the_branches():
    model = randomise(inject(make_model()))
    samples = make_samples([9, 14, 5])
    ids = torch.nn.utils.rnn.pad_sequence([s["input_ids"] for s in samples], batch_first=True)
    fresh, kept = FrozenPrefix(model, 2, 10**6), FrozenPrefix(model, 2, 10**6)
    expected = model(ids, output_hidden_states=True).hidden_states[2]
    kept.keep(samples[:2], {"input_ids": ids[:2], "positions": torch.tensor([3])})
    randomise(model, seed=8)
    for prefix in (fresh, kept):
        found = prefix.outputs(samples, {"input_ids": ids})
        for i, sample in enumerate(samples):
            length = len(sample["input_ids"])
            torch.testing.assert_close(
                found[i, :length], expected[i, :length].detach(), atol=1e-5, rtol=1e-5
            )


def test_the_routed_reading_of_a_run(flags, tmp_path):
    """Prompts that differ in their first word find their task, and its fast branch."""
    tasks = ["T1_general", "T2_math", "T3_code"]
    assert train_slsd_seq.main(flags(task_order=tasks, all_readings=True)) == 0
    rows = read(tmp_path / "logs" / "seq_eval_loss.jsonl")
    loss = {(r["stage"], r["eval_task"], r["branches"]): r["loss"] for r in rows}
    routed = read(tmp_path / "logs" / "seq_router.jsonl")
    assert len(routed) == 6
    right = [r for r in routed if set(r["answered_as"]) == {r["eval_task"]}]
    assert len(right) >= 5
    for row in right:
        stage, task = row["stage"], row["eval_task"]
        assert loss[stage, task, "routed"] == pytest.approx(loss[stage, task, "own"], abs=1e-6)
    folder = tmp_path / "checkpoints" / "seq_T2_math"
    assert json.loads((folder / "ds_lora.json").read_text())["method"] == "ds_lora"
    assert (folder / "router.safetensors").exists()


def test_without_a_frozen_layer_there_is_no_routing(flags, tmp_path):
    assert train_slsd_seq.main(flags(task_order=["T1_general"], num_frozen_layers=0)) == 0
    rows = read(tmp_path / "logs" / "seq_eval_loss.jsonl")
    assert {r["branches"] for r in rows} == {"latest", "own", "slow", "fast", "stage"}
    assert not (tmp_path / "checkpoints" / "seq_T1_general" / "router.safetensors").exists()
