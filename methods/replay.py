"""Experience replay: keeps some of every task and learns of it again at each step.

L = L_sup + mean cross entropy of the response tokens of `memory_batch_size` kept samples
(Chaudhry et al. 2019, "On tiny episodic memories in continual learning").
"""

from methods.memory import (
    MemoryKnobs,
    choose_kept,
    draw,
    learn_again,
    num_kept_of,
    sample_bytes,
)
from methods.method import Method
from models.answers import PackedSamples


class Replay(Method):
    knobs = (MemoryKnobs,)

    def __init__(self, cfg, tools):
        super().__init__(cfg, tools)
        self.samples: list[dict] = []

    @classmethod
    def kept_bytes(cls, cfg, model, sizes):
        return sum(sample_bytes(cfg, num_kept_of(cfg, size)) for size in sizes)

    @property
    def num_kept(self):
        return len(self.samples)

    def auxiliary_samples(self):
        return self.samples

    def aux_backward(self, step, backward):
        if self.samples:
            chosen = [self.samples[i] for i in draw(self.cfg, self.samples, step)]
            learn_again(self.model, self.tools.make_passes, chosen, backward)

    def end_task(self, task, samples, is_last):
        self.samples += choose_kept(self.cfg, task, samples)

    def state(self):
        return PackedSamples.build(self.samples).tensors() if self.samples else {}

    def restore(self, tensors):
        self.samples = list(PackedSamples(**tensors)) if tensors else []
