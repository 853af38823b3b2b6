"""O-LoRA: each task learns a LoRA of its own in a subspace orthogonal to those before it.

L = L_sup + olora_lambda sum over layers of |A_old A^T|_1, where A_old stacks the A of all earlier
tasks, which are frozen and added up with the new one (Wang et al. 2023, "Orthogonal subspace
learning for language model continual learning", eq. 6 and 7; the published weight 0.5). Slow is the
stack of the earlier tasks' LoRAs, fast the new one.
"""

from dataclasses import dataclass

import torch

from configs.command_line import Knobs, knob
from methods.method import Method
from models.ds_lora import ds_lora_layers, freeze_branch, reset_branch


@dataclass
class OLoRAKnobs(Knobs):
    olora_lambda: float = knob(0.5, "weight of the overlap with earlier tasks' A", at_least=0)


class OLoRA(Method):
    knobs = (OLoRAKnobs,)

    def __init__(self, cfg, tools):
        super().__init__(cfg, tools)
        freeze_branch(self.model, "slow")
        self.has_earlier = False

    def begin_task(self, task, samples, previous):
        if previous:
            self.stack()
            reset_branch(self.model, "fast", self.cfg.seed, task, "fast branch")

    @torch.no_grad()
    def stack(self) -> None:
        """Puts the task just learned beside the earlier ones; fast is free for the next."""
        for layer in ds_lora_layers(self.model).values():
            A, B = (parameter.detach() for parameter in layer.branch("fast"))
            if self.has_earlier:
                A_slow, B_slow = layer.branch("slow")
                A, B = torch.cat([A_slow, A]), torch.cat([B_slow, B], dim=1)
            layer.set_branch("slow", A, B)
        self.has_earlier = True

    def overlap(self) -> torch.Tensor:
        """Sum over layers of |A_old A^T|_1, a scalar; this process's share of it."""
        layers = ds_lora_layers(self.model).values()
        parts = [(layer.lora_A_slow @ layer.lora_A_fast.T).abs().sum() for layer in layers]
        return sum(parts) / self.tools.processes

    def aux_backward(self, step, backward):
        if self.has_earlier and self.cfg.olora_lambda:
            backward(self.cfg.olora_lambda * self.overlap())

    def state(self):
        return {"has_earlier": torch.tensor(self.has_earlier)}

    def restore(self, tensors):
        self.has_earlier = bool(tensors["has_earlier"])
