"""Sequential fine-tuning: one LoRA, task after task, and nothing against forgetting."""

from methods.method import Method


class SequentialLoRA(Method):
    needs_several_tasks = False
    # In all layers, as LoRA is mostly used.
    variants = {"seq_lora": {}, "seq_lora_all": {"num_frozen_layers": 0}}
