"""Learning without forgetting: the previous model's answers to the new task, for all that trains.

L = L_sup + kd_lambda KL(theta(t-1) || theta) on the new task's own samples (Li & Hoiem 2017): SLSD
with any samples as probes, and one LoRA that follows both losses. Only so many samples are read
beforehand as the task's steps will distil.
"""

import copy

from methods.method import Method
from methods.slsd import SLSD


class LwF(SLSD):
    name = "lwf"
    knobs = ()
    uses = ("lr_lora", "kd_lambda", "kd_temperature", "kd_top_k", "kd_batch_size", "kd_every")
    is_one_lora = True
    readings = Method.readings
    needs_several_tasks = True
    variants = {}

    def __init__(self, cfg, tools):
        super().__init__(as_slsd(cfg, tools.most_steps), tools)

    @classmethod
    def kept_bytes(cls, cfg, model, sizes):
        steps = cfg.num_epochs * -(-max(sizes) // cfg.samples_per_step)
        own = as_slsd(cfg, min(steps, cfg.max_steps_per_task or steps))
        return super().kept_bytes(own, model, sizes)

    @classmethod
    def device_bytes(cls, cfg, model, positions):
        return super().device_bytes(as_slsd(cfg, 0), model, positions)


def as_slsd(cfg, most_steps: int):
    """`cfg` as SLSD takes it to be LwF, where no task has more than `most_steps` steps."""
    cfg = copy.copy(cfg)
    vars(cfg).update(
        use_slsd=True,
        consolidate="none",
        fast_init="continue",
        kd_branches="all",
        kd_forward="joint",
        kd_probes="current",
        probe_choice="random",
        probe_size_per_task=cfg.kd_batch_size * -(-most_steps // cfg.kd_every),
    )
    return cfg
