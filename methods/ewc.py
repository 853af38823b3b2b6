"""What DS-LoRA + SLSD is compared with, as objects of the same life cycle (see `models.slsd.SLSD`).

`begin_task` before a task that follows another, `aux_backward` before the supervised passes of each
optimizer step, `end_task` after each task. Learning without forgetting is SLSD itself with all
samples as probes and all branches distilled; sequential LoRA and joint training need nothing here.
"""

import random

import torch
from torch import nn

from models.ds_lora import BRANCHES, reset_branch
from models.forward import cross_entropy, evaluation, response_logits
from models.answers import PackedSamples


class Baseline:
    """Does nothing: sequential fine-tuning."""

    def begin_task(self, task: str, samples) -> None:
        """Before the first step of a task that follows another."""

    def auxiliary_samples(self) -> list[dict]:
        """What `aux_backward` reads during this task."""
        return []

    def aux_backward(self, step: int, backward):
        """Leaves what gradients it wants before the supervised passes; nothing to log."""

    def end_task(self, task: str, samples) -> None:
        """After the last step of each task."""

    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` needs to go on, inside a task or between two."""
        return {}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes up what `state` gave."""


class Bank(Baseline):
    """A LoRA of its own for each task: every task begins with new branches.

    Args:
        seed_torch: seeds torch's generator from any values.
        seed: of the new branches.
    """

    def __init__(self, model: nn.Module, seed_torch, seed: int):
        self.model, self.seed_torch, self.seed = model, seed_torch, seed

    def begin_task(self, task, samples):
        for branch in BRANCHES:
            self.seed_torch(self.seed, task, f"{branch} branch")
            reset_branch(self.model, branch)


class Replay(Baseline):
    """Keeps a share of every task and learns some of it again at each step.

    L = L_sup + mean cross entropy of the response tokens of `batch_size` kept samples, as in
    experience replay (Chaudhry et al. 2019, "On tiny episodic memories").

    Args:
        make_passes: see `models.slsd.SLSD`.
        fraction: of a task's training samples that is kept, at least one.
        batch_size: kept samples learned again at each optimizer step.
        seed: of what is kept and of the order in which it is read.
    """

    def __init__(self, model: nn.Module, make_passes, *, fraction, batch_size: int, seed: int):
        self.model, self.make_passes = model, make_passes
        self.fraction, self.batch_size, self.seed = fraction, batch_size, seed
        self.samples: list[dict] = []

    def auxiliary_samples(self):
        return self.samples

    def aux_backward(self, step, backward):
        if not self.samples:
            return
        order = random.Random(f"{self.seed}/{len(self.samples)}/{step}")
        chosen = order.sample(self.samples, min(self.batch_size, len(self.samples)))
        tokens = sum(int((sample["labels"] != -100).sum()) for sample in chosen)
        for _, batch, targets in self.make_passes(chosen):
            backward(cross_entropy(response_logits(self.model, **batch), targets) / tokens)

    def end_task(self, task, samples):
        size = max(1, round(self.fraction * len(samples)))
        chosen = random.Random(f"{self.seed}/{task}/replay").sample(range(len(samples)), size)
        # What `restore` gives, and nothing else: samples from before and after a resume are alike.
        self.samples += list(PackedSamples.build([samples[i] for i in chosen]))

    def state(self):
        return PackedSamples.build(self.samples).tensors() if self.samples else {}

    def restore(self, tensors):
        self.samples = list(PackedSamples(**tensors)) if tensors else []


class EWC(Baseline):
    """Elastic weight consolidation, online: a quadratic penalty for moving what mattered.

    L = L_sup + weight / 2 sum_j F_j (theta_j - theta*_j)^2 (Kirkpatrick et al. 2017, eq. 3), with
    one running sum F of the tasks' diagonal Fishers and one anchor theta*, the last task's end
    (Schwarz et al. 2018, section 3.2, gamma = 1). A task's F is empirical and, like the
    loss, per response token: sum over samples of (grad -log p(response))^2 / response tokens.

    Args:
        params: what is trained.
        make_passes, gather: see `models.slsd.SLSD`.
        processes: how many share the samples.
        num_samples: most samples a Fisher is estimated from.
    """

    def __init__(
        self,
        model: nn.Module,
        params,
        make_passes,
        gather,
        *,
        processes: int,
        weight: float,
        num_samples: int,
        seed: int,
    ):
        self.model, self.params, self.make_passes, self.gather = model, params, make_passes, gather
        self.processes = processes
        self.weight, self.num_samples, self.seed = weight, num_samples, seed
        self.fisher: list[torch.Tensor] = []
        self.anchor: list[torch.Tensor] = []

    def penalty(self) -> torch.Tensor:
        """weight / 2 sum_j F_j (theta_j - theta*_j)^2, a scalar."""
        terms = zip(self.fisher, self.params, self.anchor, strict=True)
        return self.weight / 2 * sum((f * (p - a) ** 2).sum() for f, p, a in terms)

    def aux_backward(self, step, backward):
        if self.fisher:
            # Gradients are summed over the processes later on.
            backward(self.penalty() / self.processes)

    def end_task(self, task, samples):
        size = min(self.num_samples, len(samples))
        chosen = random.Random(f"{self.seed}/{task}/fisher").sample(range(len(samples)), size)
        fisher, tokens = [torch.zeros_like(p) for p in self.params], 0
        # One sample a pass and process: the gradients are squared before they are summed.
        with evaluation(self.model), torch.enable_grad():
            for i in range(0, size, self.processes):
                group = [samples[j] for j in chosen[i : i + self.processes]]
                for _, batch, targets in self.make_passes(group):
                    loss = cross_entropy(response_logits(self.model, **batch), targets)
                    gradients = torch.autograd.grad(loss, self.params)
                    for total, gradient in zip(fisher, gradients, strict=True):
                        total += gradient**2
                    tokens += len(targets)
        everyone = self.gather(([f.cpu() for f in fisher], tokens))
        tokens = sum(of_process for _, of_process in everyone)
        before = self.fisher or [torch.zeros_like(p) for p in self.params]
        self.fisher = [
            old + sum(parts).to(old.device) / tokens
            for old, *parts in zip(before, *(of_process for of_process, _ in everyone), strict=True)
        ]
        self.anchor = [p.detach().clone() for p in self.params]

    def state(self):
        names = {"fisher": self.fisher, "anchor": self.anchor}
        return {f"{n}.{i:04d}": t.cpu() for n, ts in names.items() for i, t in enumerate(ts)}

    def restore(self, tensors):
        for name in ("fisher", "anchor"):
            keys = sorted(key for key in tensors if key.startswith(name))
            of_name = [tensors[k].to(p.device) for k, p in zip(keys, self.params, strict=False)]
            setattr(self, name, of_name)
