"""Dark Experience Replay++: kept samples are learned again, and their logits are kept in place.

L = L_sup + der_alpha MSE(logits now, logits then) + der_beta CE(kept), with two draws from the
memory (Buzzega et al. 2020, "Dark experience for general continual learning", eq. 6; the weights of
its Sequential CIFAR-10 table). Two things differ: the memory holds as many samples of each task,
chosen at the task's end with the logits of then, where the paper fills a reservoir as it trains;
and of a vocabulary only the `kd_top_k` largest logits are kept, so the squared differences are
those of the log-probabilities of these classes.
"""

from dataclasses import dataclass

import torch

from configs.command_line import Knobs, knob
from methods.memory import KeptAnswers, MemoryKnobs, learn_again
from methods.method import Method
from models.answers import ProbeBuffer, teacher_of_pass
from models.forward import picked_log_probs, response_logits


@dataclass
class DERKnobs(Knobs):
    der_alpha: float = knob(0.1, "weight of the squared difference of logits; 0: off", at_least=0)
    der_beta: float = knob(0.5, "weight of the kept samples' cross entropy; 0: off", at_least=0)


class DERPlusPlus(Method):
    knobs = (DERKnobs, MemoryKnobs)
    uses = ("lr_lora", "kd_top_k")

    def __init__(self, cfg, tools):
        super().__init__(cfg, tools)
        self.kept = KeptAnswers(cfg, tools)

    @classmethod
    def kept_bytes(cls, cfg, model, sizes):
        return KeptAnswers.kept_bytes(cfg, model, sizes)

    @property
    def num_kept(self):
        return len(self.kept)

    def auxiliary_samples(self):
        return self.kept.samples()

    def aux_backward(self, step, backward):
        if len(self.kept) and self.cfg.der_alpha:
            self.match_logits(self.kept.draw(step), backward)
        if len(self.kept) and (weight := self.cfg.der_beta):
            again = [buffer[i] for buffer, i in self.kept.draw(step, "/labels")]
            learn_again(self.model, self.tools.make_passes, again, backward, weight)

    def match_logits(self, chosen: list[tuple[ProbeBuffer, int]], backward) -> None:
        """Leaves the gradient of der_alpha times the mean squared difference of kept classes."""
        tokens = sum(int(buffer.response_lengths[i]) for buffer, i in chosen)
        for indices, batch, _ in self.tools.make_passes([buffer[i] for buffer, i in chosen]):
            logits = response_logits(self.model, **batch)
            then, ids, _ = teacher_of_pass([chosen[j] for j in indices], logits.device)
            now = picked_log_probs(logits, ids)
            backward(self.cfg.der_alpha * torch.square(now - then).mean(-1).sum() / tokens)

    def end_task(self, task, samples, is_last):
        if not is_last:
            self.kept.keep(task, samples)

    def state(self):
        return self.kept.state()

    def restore(self, tensors):
        self.kept.restore(tensors)
