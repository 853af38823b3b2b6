"""What makes each published method that method, by an independent calculation."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    alone,
    inject,
    make_method,
    make_model,
    make_samples,
    mean_loss,
    parameters,
    passes,
    randomise,
)

from models.answers import coarsen, kd_loss
from models.ds_lora import branch_parameters, ds_lora_layers
from models.forward import evaluation, response_logits

MEMORY = {"memory_per_task": 4, "memory_batch_size": 2}


def backward(loss):
    loss.backward()


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in parameters(model)]


def spied(method) -> list:
    """The samples that the method reads from now on."""
    seen = []
    method.tools.make_passes = lambda samples: seen.append(list(samples)) or passes(samples)
    return seen


def logits_of(model, samples):
    (_, batch, targets), *_ = passes(samples, 1000)
    return response_logits(model, **batch), targets


def learned(name, **settings):
    """(model, method) after a first task, moved a little since."""
    model = randomise(inject(make_model()))
    method = make_method(name, model, **{**MEMORY, **settings})
    method.begin_task("T1", [], None)
    method.end_task("T1", make_samples([12, 7, 20, 9]), False)
    with torch.no_grad():
        for parameter in parameters(model):
            parameter += 0.05 * torch.randn_like(parameter)
    method.begin_task("T2", [], "T1")
    return model, method


def test_derpp_adds_squared_differences_of_logits_and_labels_of_other_samples():
    model, method = learned("derpp", der_alpha=0.3, der_beta=0.7)
    (buffer,) = method.kept.of_tasks
    then = {sample["id"]: buffer.answers(i) for i, sample in enumerate(buffer)}
    seen = spied(method)
    method.aux_backward(5, backward)
    found = gradients(model)
    matched, again = seen
    squares = tokens = 0
    for sample in matched:
        log_p = logits_of(model, [sample])[0].log_softmax(-1)
        log_probs, ids, _ = then[sample["id"]]
        squares = squares + (log_p.gather(-1, ids) - log_probs).square().mean(-1).sum()
        tokens += len(log_p)
    expected = torch.autograd.grad(
        0.3 * squares / tokens + 0.7 * mean_loss(model, again), parameters(model)
    )
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_agem_projects_a_step_that_would_raise_the_loss_of_kept_samples(sign):
    model, method = learned("agem")
    seen = spied(method)
    assert method.aux_backward(0, backward) is None
    assert gradients(model) == [None] * len(parameters(model))
    reference = torch.cat(
        [g.flatten() for g in torch.autograd.grad(mean_loss(model, seen[0]), parameters(model))]
    )
    noise = torch.randn(len(reference), generator=torch.Generator().manual_seed(0))
    gradient = sign * reference + 0.1 * reference.norm() / noise.norm() * noise
    for p, part in zip(
        parameters(model), gradient.split([p.numel() for p in parameters(model)]), strict=True
    ):
        p.grad = part.view_as(p).clone()
    method.after_backward(0)
    found = torch.cat([p.grad.flatten() for p in parameters(model)])
    if sign > 0:
        assert torch.equal(found, gradient)
    else:
        unit = reference / reference.norm()
        torch.testing.assert_close(found, gradient - (gradient @ unit) * unit, atol=1e-6, rtol=1e-3)
        assert abs(found @ unit) < 1e-4 * gradient.norm()


def test_agem_leaves_a_step_alone_whose_reference_overflowed():
    model, method = learned("agem")
    for p in parameters(model):
        p.grad = torch.ones_like(p)
    method.reference = torch.full((sum(p.numel() for p in parameters(model)),), -math.inf)
    method.after_backward(0)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in parameters(model))


def test_olora_stacks_frozen_tasks_and_punishes_overlap():
    model = randomise(inject(make_model()))
    method = make_method("olora", model, olora_lambda=0.5)
    (group,) = method.param_groups(method.cfg, model)
    assert len(group["params"]) == len(branch_parameters(model, "fast"))
    assert method.aux_backward(0, backward) is None and gradients(model)[-1] is None
    method.begin_task("T2", [], "T1")
    randomise(model, seed=3)
    before = [layer.lora_A_slow.clone() for layer in ds_lora_layers(model).values()]
    expected = 0
    for A_old, layer in zip(before, ds_lora_layers(model).values(), strict=True):
        for old in A_old:
            for new in layer.lora_A_fast.detach():
                expected += abs(float(old @ new))
    torch.testing.assert_close(method.overlap().item(), expected, rtol=1e-4, atol=0)
    method.aux_backward(0, backward)
    assert all(p.grad is None for p in branch_parameters(model, "slow"))
    assert all(layer.lora_A_fast.grad.any() for layer in ds_lora_layers(model).values())
    # A third task: slow holds both, in order, and the sum of all is what was there.
    ids = torch.arange(3, 12)[None]
    with evaluation(model):
        whole = model(ids).logits
        method.begin_task("T3", [], "T2")
        torch.testing.assert_close(model(ids).logits, whole, rtol=1e-4, atol=1e-5)
    assert all(len(layer.lora_A_slow) == 8 for layer in ds_lora_layers(model).values())


def test_ilora_follows_by_a_moving_average_and_holds_hidden_states_from_below():
    model, method = learned("ilora", ilora_weight=2.0, ilora_decay=0.25)
    method.slow_copy = [0.5 * p.detach().clone() for p in parameters(model)]
    before = [p.clone() for p in method.slow_copy]
    method.after_step(9)
    for old, now, live in zip(before, method.slow_copy, parameters(model), strict=True):
        torch.testing.assert_close(now, 0.25 * old + 0.75 * live)
    # The first step of all counts as 1.
    method.cfg.ilora_decay = 0.9
    method.slow_copy = [p.clone() for p in before]
    method.after_step(0)
    for old, now, live in zip(before, method.slow_copy, parameters(model), strict=True):
        torch.testing.assert_close(now, 0.5 * old + 0.5 * live)
    method.cfg.ilora_decay = 0.25

    method.slow_copy = [0.5 * p.detach().clone() for p in parameters(model)]
    seen = spied(method)
    method.aux_backward(3, backward)
    found, live = gradients(model), [p.detach().clone() for p in parameters(model)]
    # Once by the slow copy, once with a gradient: both count as read.
    chosen, again = seen
    assert [sample["id"] for sample in again] == [sample["id"] for sample in chosen]

    def hidden(values):
        """Outputs of both layers with branches at each sample's response, with these weights."""
        with torch.no_grad():
            for parameter, value in zip(parameters(model), values, strict=True):
                parameter.copy_(value)
        outputs = []
        layers = model.model.layers[2:]
        hooks = [
            layer.register_forward_hook(lambda _, args, out: outputs.append(out))
            for layer in layers
        ]
        for sample in chosen:
            model(sample["input_ids"][None])
        for hook in hooks:
            hook.remove()
        of_samples = [sample for sample in chosen for _ in layers]
        return [
            out[0][len(sample["labels"]) // 2 - 1 : -1]
            for out, sample in zip(outputs, of_samples, strict=True)
        ]

    with torch.no_grad():
        slow = hidden(method.slow_copy)
    fast = hidden(live)
    pairs = zip(fast, slow, strict=True)
    apart = sum(F.relu(s - f).square().mean(-1).sum() for f, s in pairs) / 2
    tokens = sum(len(sample["labels"]) - len(sample["labels"]) // 2 for sample in chosen)
    loss = mean_loss(model, chosen) + 2 * 2.0 * apart / tokens
    expected = torch.autograd.grad(loss, parameters(model))
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-3)


SILENT = {"memory_ce": 0.0, "memory_kd": 0.0, "anchor_lambda": 0.0, "sync_every": 0}


@pytest.mark.parametrize("part", ["memory_ce", "memory_kd", "anchor_lambda"])
def test_each_part_of_slsd_plus_is_what_it_says_and_zero_is_off(part):
    model, method = learned("slsd_plus", **{**SILENT, "anchor_lambda": 1.0}, fisher_samples=3)
    method.cfg = make_method("slsd_plus", model, **{**MEMORY, **SILENT, part: 0.6}).cfg
    seen = spied(method)
    method.aux_backward(4, backward)
    found = gradients(model)
    if part == "anchor_lambda":
        terms = zip(method.anchor.fisher, parameters(model), method.anchor.values, strict=True)
        loss = 0.6 / 2 * sum((f * (p - a) ** 2).sum() for f, p, a in terms)
        assert seen == []
    elif part == "memory_ce":
        loss = 0.6 * mean_loss(model, seen[0])
    else:
        (buffer,) = method.kept.of_tasks
        numbers = {s["id"]: i for i, s in enumerate(buffer)}
        total = tokens = 0
        for sample in seen[0]:
            answer = buffer.answers(numbers[sample["id"]])
            total = total + kd_loss(logits_of(model, [sample])[0].clone(), *answer)
            tokens += len(answer[2])
        loss = 0.6 * total / tokens
    expected = torch.autograd.grad(loss, parameters(model))
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-3)


def test_with_all_parts_off_slsd_plus_does_nothing():
    model, method = learned("slsd_plus", **SILENT)
    before = [p.detach().clone() for p in parameters(model)]
    assert method.aux_backward(0, backward) is None
    method.after_step(0)
    assert all(p.grad is None for p in parameters(model))
    assert all(map(torch.equal, before, parameters(model)))


def test_slow_weights_meet_the_live_ones_every_so_many_steps_and_at_the_end():
    model, method = learned("slsd_plus", **{**SILENT, "sync_every": 3}, sync_rate=0.25)
    start = [p.detach().clone() for p in parameters(model)]

    def move():
        with torch.no_grad():
            for parameter in parameters(model):
                parameter += 1.0

    for step in range(4):
        move()
        method.after_step(step)
        # Three steps up, a quarter of the way kept, and one more step.
        ahead = (1.0, 2.0, 0.75, 1.75)[step]
        for parameter, value in zip(parameters(model), start, strict=True):
            torch.testing.assert_close(parameter.detach(), value + ahead)
    method.end_task("T2", make_samples([9]), True)
    for parameter, value in zip(parameters(model), start, strict=True):
        torch.testing.assert_close(parameter.detach(), value + 0.75 + 0.25)


def test_what_is_kept_are_the_answers_of_the_model_that_had_just_learned():
    model = randomise(inject(make_model()))
    method = make_method("slsd_plus", model, **MEMORY)
    method.end_task("T1", make_samples([12, 7, 20, 9]), False)
    assert method.num_kept == 4 and method.tools.gather is alone
    (buffer,) = method.kept.of_tasks
    for i, sample in enumerate(buffer):
        with torch.no_grad():
            expected = coarsen(logits_of(model, [sample])[0], 16)
        torch.testing.assert_close(buffer.answers(i)[0], expected[0], atol=2e-3, rtol=2e-3)
        assert torch.equal(buffer.answers(i)[1], expected[1])
    other = make_method("slsd_plus", model, **MEMORY)
    other.restore(method.state())
    assert other.state().keys() == method.state().keys()
    assert all(torch.equal(value, other.state()[key]) for key, value in method.state().items())
