"""Averaged GEM: a step that would raise the loss of kept samples is projected.

g' = g - (g . g_ref / g_ref . g_ref) g_ref where g . g_ref < 0, with g_ref the gradient of the mean
cross entropy of some kept samples (Chaudhry et al. 2019, "Efficient lifelong learning with A-GEM",
eq. 11).
"""

import torch

from methods.method import branch_bytes
from methods.replay import Replay
from models.ds_lora import BRANCHES, branch_parameters


class AGEM(Replay):
    def __init__(self, cfg, tools):
        super().__init__(cfg, tools)
        self.params = [p for branch in BRANCHES for p in branch_parameters(self.model, branch)]
        self.reference: torch.Tensor | None = None

    @classmethod
    def device_bytes(cls, cfg, model, positions):
        # The reference; the gradient as one tensor comes after the passes, which take more.
        return branch_bytes(model)

    def aux_backward(self, step, backward):
        self.reference = None
        if not self.samples:
            return
        super().aux_backward(step, backward)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        self.reference = torch.cat([grad.flatten() for grad in grads])
        for parameter in self.params:
            parameter.grad = None

    def after_backward(self, step):
        if self.reference is None:
            return
        # Its scale does not matter, that of loss scaling included.
        reference = self.tools.add_up(self.reference)
        # One that overflowed, as loss scaling may have it, says nothing.
        reference = torch.where(reference.isfinite().all(), reference, 0.0)
        gradient = torch.cat([p.grad.flatten() for p in self.params])
        dot = gradient @ reference
        share = torch.where(dot < 0, dot / (reference @ reference), 0.0)
        parts = reference.split([p.numel() for p in self.params])
        for parameter, part in zip(self.params, parts, strict=True):
            parameter.grad -= share * part.view_as(parameter)
