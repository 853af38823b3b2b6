"""Elastic weight consolidation, online: a quadratic penalty for moving what mattered.

L = L_sup + ewc_lambda / 2 sum_j F_j (theta_j - theta*_j)^2 (Kirkpatrick et al. 2017, eq. 3), with
one running sum F of the tasks' diagonal Fishers and one anchor theta*, the last task's end (Schwarz
et al. 2018, section 3.2, gamma = 1). A task's F is empirical and, like the loss, per response
token: sum over samples of (grad -log p(response))^2 / response tokens.
"""

import random
from dataclasses import dataclass

import torch

from configs.command_line import Knobs, knob
from methods.method import Method, Tools, branch_bytes
from models.ds_lora import BRANCHES, branch_parameters
from models.forward import cross_entropy, evaluation, response_logits


@dataclass
class FisherKnobs(Knobs):
    fisher_samples: int = knob(500, "most samples of a task to estimate its Fisher", at_least=1)


@dataclass
class EWCKnobs(Knobs):
    ewc_lambda: float = knob(
        1000.0, "weight of the penalty, half the Fisher times the squared change", at_least=0
    )


class Anchor:
    """Where both branches stood at the last task's end, and how much each number mattered."""

    def __init__(self, cfg, tools: Tools):
        self.cfg, self.tools, self.model = cfg, tools, tools.model
        both = [p for branch in BRANCHES for p in branch_parameters(self.model, branch)]
        self.params = [p for p in both if p.requires_grad]
        self.fisher: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def penalty(self) -> torch.Tensor:
        """1/2 sum_j F_j (theta_j - theta*_j)^2, a scalar; this process's share of it."""
        terms = zip(self.fisher, self.params, self.values, strict=True)
        # Gradients are summed over the processes later on.
        return sum((f * (p - a) ** 2).sum() for f, p, a in terms) / (2 * self.tools.processes)

    def renew(self, task: str, samples) -> None:
        """After a task: adds its Fisher, and anchors the branches where they are now."""
        before = self.fisher or [torch.zeros_like(p) for p in self.params]
        new = self.tools.with_less_memory(lambda: self.estimate(task, samples))
        self.fisher = [old + of_task for old, of_task in zip(before, new, strict=True)]
        self.values = [p.detach().clone() for p in self.params]

    def estimate(self, task: str, samples) -> list[torch.Tensor]:
        """The diagonal Fisher of `task`, a tensor for each parameter, the same in all processes."""
        processes, size = self.tools.processes, min(self.cfg.fisher_samples, len(samples))
        order = random.Random(f"{self.cfg.seed}/{task}/fisher")
        chosen = order.sample(range(len(samples)), size)
        fisher, tokens = [torch.zeros_like(p) for p in self.params], 0
        # One sample a pass and process: the gradients are squared before they are summed.
        with evaluation(self.model), torch.enable_grad():
            for i in range(0, size, processes):
                group = [samples[j] for j in chosen[i : i + processes]]
                for _, batch, targets in self.tools.make_passes(group):
                    loss = cross_entropy(response_logits(self.model, **batch), targets)
                    gradients = torch.autograd.grad(loss, self.params)
                    for total, gradient in zip(fisher, gradients, strict=True):
                        total += gradient**2
                    tokens += len(targets)
        everyone = self.tools.gather(([f.cpu() for f in fisher], tokens))
        tokens = sum(of_process for _, of_process in everyone)
        parts = zip(*(of_process for of_process, _ in everyone), strict=True)
        return [sum(of_p).to(p.device) / tokens for of_p, p in zip(parts, self.params, strict=True)]

    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` takes up."""
        names = {"fisher": self.fisher, "anchor": self.values}
        return {f"{n}.{i:04d}": t.cpu() for n, ts in names.items() for i, t in enumerate(ts)}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes up what `state` gave."""

        def part(name: str) -> list[torch.Tensor]:
            keys = sorted(key for key in tensors if key.startswith(f"{name}."))
            return [tensors[k].to(p.device) for k, p in zip(keys, self.params, strict=False)]

        self.fisher, self.values = part("fisher"), part("anchor")


def anchor_bytes(model) -> int:
    """Of an `Anchor` on the device: Fisher and values. What the penalty's backward needs of them
    is gone before the passes begin, which take more."""
    return 2 * branch_bytes(model)


class EWC(Method):
    knobs = (EWCKnobs, FisherKnobs)

    def __init__(self, cfg, tools):
        super().__init__(cfg, tools)
        self.anchor = Anchor(cfg, tools)

    @classmethod
    def kept_bytes(cls, cfg, model, sizes):
        return 2 * branch_bytes(model)

    @classmethod
    def device_bytes(cls, cfg, model, positions):
        return anchor_bytes(model)

    def aux_backward(self, step, backward):
        if self.anchor.fisher and self.cfg.ewc_lambda:
            backward(self.cfg.ewc_lambda * self.anchor.penalty())

    def end_task(self, task, samples, is_last):
        if not is_last:
            self.anchor.renew(task, samples)

    def state(self):
        return self.anchor.state()

    def restore(self, tensors):
        self.anchor.restore(tensors)
