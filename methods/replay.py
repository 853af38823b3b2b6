"""Experience replay: keeps a share of every task and learns some of it again at each step.

L = L_sup + mean cross entropy of the response tokens of `replay_batch_size` kept samples
(Chaudhry et al. 2019, "On tiny episodic memories in continual learning").
"""

import random
from dataclasses import dataclass

from configs.command_line import Knobs, knob
from methods.method import Method
from models.answers import PackedSamples
from models.forward import cross_entropy, response_logits, response_tokens


@dataclass
class ReplayKnobs(Knobs):
    replay_fraction: float = knob(
        0.02, "share of each earlier task that is kept", above=0, at_most=1
    )
    replay_batch_size: int = knob(4, "kept samples learned again at each step", at_least=1)


class Replay(Method):
    knobs = (ReplayKnobs,)

    def __init__(self, cfg, tools):
        super().__init__(cfg, tools)
        self.samples: list[dict] = []

    def auxiliary_samples(self):
        return self.samples

    def aux_backward(self, step, backward):
        if not self.samples:
            return
        order = random.Random(f"{self.cfg.seed}/{len(self.samples)}/{step}")
        size = min(self.cfg.replay_batch_size, len(self.samples))
        chosen = order.sample(self.samples, size)
        tokens = sum(map(response_tokens, chosen))
        for _, batch, targets in self.tools.make_passes(chosen):
            backward(cross_entropy(response_logits(self.model, **batch), targets) / tokens)

    def end_task(self, task, samples, is_last):
        size = max(1, round(self.cfg.replay_fraction * len(samples)))
        order = random.Random(f"{self.cfg.seed}/{task}/replay")
        chosen = [samples[i] for i in order.sample(range(len(samples)), size)]
        # What `restore` gives, and nothing else: samples from before and after a resume are alike.
        self.samples += list(PackedSamples.build(chosen))

    def state(self):
        return PackedSamples.build(self.samples).tensors() if self.samples else {}

    def restore(self, tensors):
        self.samples = list(PackedSamples(**tensors)) if tensors else []
