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
from methods.method import Method
from models.ds_lora import BRANCHES, branch_parameters
from models.forward import cross_entropy, evaluation, response_logits


@dataclass
class EWCKnobs(Knobs):
    ewc_lambda: float = knob(
        1000.0, "weight of the penalty, half the Fisher times the squared change", at_least=0
    )
    fisher_samples: int = knob(500, "most samples of a task to estimate its Fisher", at_least=1)


class EWC(Method):
    knobs = (EWCKnobs,)

    def __init__(self, cfg, tools):
        super().__init__(cfg, tools)
        self.params = [p for branch in BRANCHES for p in branch_parameters(self.model, branch)]
        self.fisher: list[torch.Tensor] = []
        self.anchor: list[torch.Tensor] = []

    @classmethod
    def kept_bytes(cls, cfg, trainable, vocabulary, num_tasks):
        return 2 * 4 * trainable

    def penalty(self) -> torch.Tensor:
        """ewc_lambda / 2 sum_j F_j (theta_j - theta*_j)^2, a scalar."""
        terms = zip(self.fisher, self.params, self.anchor, strict=True)
        return self.cfg.ewc_lambda / 2 * sum((f * (p - a) ** 2).sum() for f, p, a in terms)

    def aux_backward(self, step, backward):
        if self.fisher:
            # Gradients are summed over the processes later on.
            backward(self.penalty() / self.tools.processes)

    def end_task(self, task, samples, is_last):
        if is_last:
            return
        before = self.fisher or [torch.zeros_like(p) for p in self.params]
        self.fisher = [
            old + new for old, new in zip(before, self.estimate(task, samples), strict=True)
        ]
        self.anchor = [p.detach().clone() for p in self.params]

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

    def state(self):
        names = {"fisher": self.fisher, "anchor": self.anchor}
        return {f"{n}.{i:04d}": t.cpu() for n, ts in names.items() for i, t in enumerate(ts)}

    def restore(self, tensors):
        for name in ("fisher", "anchor"):
            keys = sorted(key for key in tensors if key.startswith(name))
            of_name = [tensors[k].to(p.device) for k, p in zip(keys, self.params, strict=False)]
            setattr(self, name, of_name)
