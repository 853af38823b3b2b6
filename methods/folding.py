"""Consolidation as methods use it: knobs, and what happens as a task begins and ends."""

import random
from dataclasses import dataclass
from functools import partial
from typing import Literal

from configs.command_line import Knobs, knob
from methods.method import Tools
from models.consolidation import Consolidation, gram_matrices
from models.ds_lora import ds_lora_layers, freeze_branch, reset_branch

PREFIX = "gram:"


@dataclass
class ConsolidationKnobs(Knobs):
    consolidate: Literal["none", "gram"] = knob(
        "none",
        "gram: at a task's end fast is folded into slow in closed form and begins anew; slow takes "
        "up what is folded, and is not trained",
    )
    gram_c: float = knob(
        0.3, "weight of the old tasks' outputs against the new one's; less learns more", at_least=0
    )
    gram_ridge: float = knob(1e-3, "of the solution, relative to the mean diagonal", above=0)
    gram_samples: int = knob(500, "most training samples of a task that are read", at_least=1)
    gram_rank: int = knob(
        0,
        "slow's rank at most, a multiple of lora_r; 0: it grows by lora_r a task",
        at_least=0,
        at_most=8192,
    )

    def problems(self):
        found = super().problems()
        # A rank that is impossible by itself is told by its own bound.
        if self.gram_rank % max(1, getattr(self, "lora_r", 1)):
            found.append(f"gram_rank is {self.gram_rank}: give 0 or a multiple of lora_r")
        return found


class Folding:
    """Does nothing with `consolidate` "none"."""

    def __init__(self, cfg, tools: Tools):
        self.cfg, self.tools, self.model = cfg, tools, tools.model
        self.is_on = cfg.consolidate == "gram"
        if self.is_on:
            rank = cfg.gram_rank
            self.consolidation = Consolidation(self.model, cfg.gram_c, cfg.gram_ridge, rank)
            freeze_branch(self.model, "slow")

    @staticmethod
    def kept_bytes(cfg, model) -> int:
        """Of the Gram matrices, on the device as in a state; see `gram_matrices`."""
        layers = ds_lora_layers(model) if cfg.consolidate == "gram" else {}
        widths = {name: layer.base_layer.in_features for name, layer in layers.items()}
        # Layers of one place and width have one input.
        inputs = {(name.rpartition(".")[0], width) for name, width in widths.items()}
        return sum(4 * width**2 for _, width in inputs)

    def begin_task(self, task: str, previous: str | None) -> None:
        """Fast begins anew."""
        if self.is_on and previous:
            reset_branch(self.model, "fast", self.cfg.seed, task, "fast branch")

    def end_task(self, task: str, samples) -> None:
        """Folds fast into slow, by the Gram matrices of the task's samples or of some of them."""
        if not self.is_on:
            return
        size = min(self.cfg.gram_samples, len(samples))
        order = random.Random(f"{self.cfg.seed}/{task}/gram")
        chosen = [samples[i] for i in order.sample(range(len(samples)), size)]
        tools = self.tools
        how = tools.make_passes, chosen, tools.gather, tools.add_up
        found = tools.with_less_memory(partial(gram_matrices, self.model, *how))
        tools.with_less_memory(partial(self.consolidation.fold, *found))

    def state(self) -> dict:
        """Its part of a method's state; `restore` finds it there."""
        grams = self.consolidation.state() if self.is_on else {}
        return {f"{PREFIX}{name}": gram for name, gram in grams.items()}

    def restore(self, tensors: dict) -> dict:
        """Takes up its part, and returns the rest."""
        own = {k.removeprefix(PREFIX): t for k, t in tensors.items() if k.startswith(PREFIX)}
        if self.is_on:
            self.consolidation.restore(own)
        return {k: tensor for k, tensor in tensors.items() if not k.startswith(PREFIX)}
