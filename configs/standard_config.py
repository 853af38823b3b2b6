"""The standard sequence of text classification (Zhang et al. 2015, as O-LoRA has it)."""

from dataclasses import dataclass

from configs.base_config import BaseConfig
from configs.task_files import suite_paths

ORDERS = {
    "order1": ["dbpedia", "amazon", "yahoo", "agnews"],
    "order2": ["dbpedia", "amazon", "agnews", "yahoo"],
    "order3": ["yahoo", "amazon", "agnews", "dbpedia"],
    # Where yahoo cannot be had.
    "without_yahoo1": ["dbpedia", "amazon", "agnews"],
    "without_yahoo2": ["amazon", "agnews", "dbpedia"],
    "without_yahoo3": ["agnews", "amazon", "dbpedia"],
}


@dataclass
class StandardConfig(BaseConfig):
    """Rates and sizes of O-LoRA's LLaMA-7B runs."""

    task_orders = ORDERS
    task_order = ORDERS["order1"]
    data_paths = suite_paths("standard", ORDERS["order1"])
    task_judges = [f"{task}=choice" for task in ORDERS["order1"]]
    max_seq_len = 562  # 512 of the prompt and 50 of the answer
    eval_samples_per_task = 0  # accuracy as papers give it: on the whole test file
    num_epochs = 1
    per_device_batch_size = 4
    gradient_accumulation_steps = 8
    lr_schedule = "constant"
    warmup_ratio = 0.0
    lr_lora = 1e-3
