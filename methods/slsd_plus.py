"""SLSD+: the tasks before are remembered by few samples, their answers, an anchor and slow weights.

    L = L_sup + memory_ce CE(kept) + memory_kd KL(answers || now) + anchor_lambda EWC penalty

on both branches, which train as one LoRA at `lr_lora`; and every `sync_every` steps slow weights
follow the live ones, slow += sync_rate (live - slow), and these go on from there. Each part has a
weight of its own, and 0 is off: what is left of the others is plain replay, replay with EWC, DER++
without its reservoir, or Reptile.

What differs from the specification's SLSD: the distilled samples belong to *earlier* tasks, not to
the one at hand, and are learned again with their labels too; their answers are those of the model
that had just learned them; both branches are moved, since the one left alone is the one that
forgets; and slow means weights that follow slowly, not a branch with a small rate. The kept samples
are read once for both of their losses, with dropout as in training.

Sources: DER++ (Buzzega et al. 2020, eq. 6), EWC (Kirkpatrick et al. 2017), Reptile (Nichol et al.
2018) and MER (Riemer et al. 2019) for slow weights within a task; SuRe (arXiv 2511.22367) merges a
fast LoRA into a slow one by a moving average.
"""

from dataclasses import dataclass

import torch

from configs.command_line import Knobs, knob
from methods.ewc import Anchor, FisherKnobs, anchor_bytes
from methods.folding import ConsolidationKnobs, Folding
from methods.memory import KeptAnswers, MemoryKnobs, teacher_bytes
from methods.method import Method, branch_bytes
from models.answers import kd_loss, teacher_of_pass
from models.forward import cross_entropy, response_logits


@dataclass
class SLSDPlusKnobs(Knobs):
    memory_ce: float = knob(0.5, "weight of the kept samples' cross entropy; 0: off", at_least=0)
    memory_kd: float = knob(0.5, "weight of the KL to their kept answers; 0: off", at_least=0)
    anchor_lambda: float = knob(75.0, "weight of the EWC penalty; 0: off", at_least=0)
    sync_every: int = knob(
        3, "steps from one meeting of slow and live weights to the next; 0: off", at_least=0
    )
    sync_rate: float = knob(0.5, "how far slow goes towards the live weights", above=0, at_most=1)

    def problems(self):
        found = super().problems()
        is_own = getattr(self, "method", "") == SLSDPlus.name
        if is_own and self.consolidate != "none" and self.anchor_lambda:
            found.append(
                f"anchor_lambda is {self.anchor_lambda} with --consolidate {self.consolidate}: a "
                "fast branch that begins anew has no anchor; give --anchor_lambda 0"
            )
        return found


class SLSDPlus(Method):
    knobs = (SLSDPlusKnobs, MemoryKnobs, FisherKnobs, ConsolidationKnobs)
    uses = ("lr_lora", "kd_top_k")
    variants = {
        "slsd_plus": {},
        "slsd_plus_consolidated": {"consolidate": "gram", "anchor_lambda": 0.0},
        "replay_ewc": {"memory_ce": 1.0, "memory_kd": 0.0, "sync_every": 0},
    }

    def __init__(self, cfg, tools):
        super().__init__(cfg, tools)
        self.folding = Folding(cfg, tools)
        self.anchor = Anchor(cfg, tools)
        self.params = self.anchor.params
        self.kept = KeptAnswers(cfg, tools)
        self.slow_weights: list[torch.Tensor] = []

    @classmethod
    def kept_bytes(cls, cfg, model, sizes):
        answers = KeptAnswers.kept_bytes(cfg, model, sizes)
        return answers + 3 * branch_bytes(model) + Folding.kept_bytes(cfg, model)

    @classmethod
    def device_bytes(cls, cfg, model, positions):
        # Beside the anchor the slow weights.
        kept = anchor_bytes(model) + branch_bytes(model) + Folding.kept_bytes(cfg, model)
        return kept + teacher_bytes(cfg, model, positions)

    @property
    def num_kept(self):
        return len(self.kept)

    def auxiliary_samples(self):
        return self.kept.samples()

    def begin_task(self, task, samples, previous):
        self.folding.begin_task(task, previous)
        if previous and self.cfg.sync_every:
            self.slow_weights = [p.detach().clone() for p in self.params]

    def aux_backward(self, step, backward):
        cfg, logged = self.cfg, None
        if len(self.kept) and (cfg.memory_ce or cfg.memory_kd):
            chosen = self.kept.draw(step)
            tokens = sum(int(buffer.response_lengths[i]) for buffer, i in chosen)
            divergence = torch.zeros((), device=self.params[0].device)
            of_chosen = [buffer[i] for buffer, i in chosen]
            for indices, batch, targets in self.tools.make_passes(of_chosen):
                logits = response_logits(self.model, **batch)
                loss = torch.zeros((), device=logits.device)
                if cfg.memory_ce:
                    # A copy: each backward writes its gradient over the logits.
                    loss = loss + cfg.memory_ce * cross_entropy(logits.clone(), targets)
                if cfg.memory_kd:
                    teacher = teacher_of_pass([chosen[j] for j in indices], logits.device)
                    kl = kd_loss(logits.clone(), *teacher)
                    loss, divergence = loss + cfg.memory_kd * kl, divergence + kl.detach()
                backward(loss / tokens)
            logged = (divergence, tokens) if cfg.memory_kd else None
        if self.anchor.fisher and cfg.anchor_lambda:
            backward(cfg.anchor_lambda * self.anchor.penalty())
        return logged

    def after_step(self, step):
        if self.slow_weights and (step + 1) % self.cfg.sync_every == 0:
            self.synchronise()

    @torch.no_grad()
    def synchronise(self) -> None:
        """slow += sync_rate (live - slow); live = slow. AdamW's moments stay."""
        for slow, live in zip(self.slow_weights, self.params, strict=True):
            slow += self.cfg.sync_rate * (live - slow)
            live.copy_(slow)

    def end_task(self, task, samples, is_last):
        if self.slow_weights:
            # Before anything reads the model: the live weights are ahead.
            self.synchronise()
            self.slow_weights = []
        self.folding.end_task(task, samples)
        if is_last:
            return
        self.kept.keep(task, samples)
        if self.cfg.anchor_lambda:
            self.anchor.renew(task, samples)

    def state(self):
        slow = {f"slow.{i:04d}": tensor.cpu() for i, tensor in enumerate(self.slow_weights)}
        return {**self.anchor.state(), **slow, **self.kept.state(), **self.folding.state()}

    def restore(self, tensors):
        tensors = self.folding.restore(tensors)
        self.anchor.restore(tensors)
        slow = sorted(key for key in tensors if key.startswith("slow."))
        device = self.params[0].device
        self.slow_weights = [tensors[key].to(device).clone() for key in slow]
        self.kept.restore(tensors)
