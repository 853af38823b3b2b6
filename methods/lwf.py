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
        cfg = copy.copy(cfg)
        vars(cfg).update(
            use_slsd=True,
            consolidate="none",
            fast_init="continue",
            kd_branches="all",
            kd_forward="joint",
            kd_probes="current",
            probe_choice="random",
            probe_size_per_task=cfg.kd_batch_size * -(-tools.most_steps // cfg.kd_every),
        )
        super().__init__(cfg, tools)
