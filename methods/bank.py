"""A LoRA of its own for each task: every task begins with new branches."""

from methods.method import Method
from models.ds_lora import BRANCHES, reset_branch


class Bank(Method):
    readings = ("latest", "own", "routed")
    meanings = {"latest": "the last LoRA", "own": "its own LoRA"}
    is_one_model = False

    def begin_task(self, task, samples, previous):
        for branch in BRANCHES if previous else ():
            reset_branch(self.model, branch, self.cfg.seed, task, f"{branch} branch")
