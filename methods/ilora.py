"""I-LoRA: a slow copy of the LoRA follows the one that learns, and holds its hidden states.

L = (L_sup + CE(kept)) / 2 + ilora_weight mean (h_fast - h_slow)^2 on kept samples, over the outputs
of the layers with branches and the numbers in which h_fast < h_slow; after each step
slow <- a slow + (1 - a) fast with a = min(1 - 1 / (step + 1), ilora_decay), steps counted from 1
(Ren et al. 2024, "Analyzing and reducing catastrophic forgetting in parameter efficient tuning",
with the weights and the one-sided difference of its published code). The model that is evaluated is
the one that learns, as there. L_sup is not halved here, so that all methods learn a task at the
same rate: the other terms are doubled instead. There the mean runs over all layers and the prompt
too, and no layer is frozen; here over what can differ, so one weight holds more.
"""

import contextlib
from dataclasses import dataclass

import torch

from configs.command_line import Knobs, knob
from methods.memory import MemoryKnobs, draw
from methods.method import branch_bytes
from methods.replay import Replay
from models.ds_lora import BRANCHES, branch_parameters, ds_lora_layers, find_decoder_layers
from models.forward import cross_entropy, response_logits, response_tokens


@dataclass
class ILoRAKnobs(Knobs):
    ilora_weight: float = knob(1.0, "weight of the hidden states' difference", at_least=0)
    ilora_decay: float = knob(
        0.25, "what the slow copy keeps of itself at a step", at_least=0, below=1
    )


class ILoRA(Replay):
    knobs = (ILoRAKnobs, MemoryKnobs)

    def __init__(self, cfg, tools):
        super().__init__(cfg, tools)
        self.params = [p for branch in BRANCHES for p in branch_parameters(self.model, branch)]
        self.slow_copy = [p.detach().clone() for p in self.params]
        decoder = find_decoder_layers(self.model)[1]
        with_branches = list(ds_lora_layers(self.model).values())
        self.layers = [
            layer for layer in decoder if any(m in with_branches for m in layer.modules())
        ]

    @classmethod
    def kept_bytes(cls, cfg, model, sizes):
        return super().kept_bytes(cfg, model, sizes) + branch_bytes(model)

    @classmethod
    def device_bytes(cls, cfg, model, positions):
        # The slow copy; while it is in place no pass keeps anything.
        return branch_bytes(model)

    def aux_backward(self, step, backward):
        if not self.samples:
            return
        chosen = [self.samples[i] for i in draw(self.cfg, self.samples, step)]
        tokens = sum(map(response_tokens, chosen))
        slow_hidden = {}
        with torch.no_grad(), self.slow_copy_in_place():
            for indices, batch, _ in self.tools.make_passes(chosen):
                of_each = self.read(batch)[1].split([response_tokens(chosen[i]) for i in indices])
                slow_hidden.update(zip(indices, of_each, strict=True))
        for indices, batch, targets in self.tools.make_passes(chosen):
            logits, fast = self.read(batch)
            slow = torch.cat([slow_hidden[i] for i in indices])
            apart = torch.where(fast < slow, fast - slow, 0.0).square().mean((1, 2)).sum()
            backward((cross_entropy(logits, targets) + 2 * self.cfg.ilora_weight * apart) / tokens)

    def read(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (n, vocabulary) and the outputs of the layers with branches (n, layers, width).

        At the response's positions; the second in fp32.
        """
        hidden = []

        def keep(_, args, output):
            output = output[0] if isinstance(output, tuple) else output
            hidden.append(output.flatten(0, 1)[batch["positions"]].float())

        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.register_forward_hook(keep).remove)
            logits = response_logits(self.model, **batch)
        return logits, torch.stack(hidden, 1)

    @contextlib.contextmanager
    def slow_copy_in_place(self):
        """Within the block the model has the slow copy's weights."""
        live = [p.detach().clone() for p in self.params]
        try:
            self._write(self.slow_copy)
            yield
        finally:
            self._write(live)

    @torch.no_grad()
    def _write(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.params, values, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def after_step(self, step):
        decay = min(1 - 1 / (step + 2), self.cfg.ilora_decay)
        for slow, live in zip(self.slow_copy, self.params, strict=True):
            slow.mul_(decay).add_(live, alpha=1 - decay)

    def state(self):
        slow = {f"slow.{i:04d}": tensor.cpu() for i, tensor in enumerate(self.slow_copy)}
        return {**super().state(), **slow}

    def restore(self, tensors):
        slow = sorted(key for key in tensors if key.startswith("slow."))
        for copy, key in zip(self.slow_copy, slow, strict=True):
            copy.copy_(tensors[key])
        super().restore({k: v for k, v in tensors.items() if not k.startswith("slow.")})
