"""The long sequence: 15 tasks of classification (Razdaibiedina et al. 2023, as O-LoRA has it)."""

from dataclasses import dataclass

from configs.base_config import BaseConfig, suite_paths

_QUESTIONS = ["MNLI", "CB", "WiC", "COPA", "QQP", "BoolQA", "RTE", "IMDB"]
_TWISTED = ["MultiRC", "BoolQA", "WiC", "MNLI", "CB", "COPA", "QQP", "RTE", "IMDB", "SST-2"]
_REVIEWS = ["yelp", "amazon", "MNLI", "CB", "COPA", "QQP", "RTE", "IMDB", "SST-2"]
# O-LoRA's orders 4 to 6 have all 15 tasks; 1 to 3 here are the same without yahoo.
ORDERS = {
    "order1": [*_QUESTIONS, "yelp", "amazon", "SST-2", "dbpedia", "agnews", "MultiRC"],
    "order2": [*_TWISTED, "dbpedia", "agnews", "yelp", "amazon"],
    "order3": [*_REVIEWS, "dbpedia", "agnews", "MultiRC", "BoolQA", "WiC"],
    "order4": [*_QUESTIONS, "yelp", "amazon", "SST-2", "dbpedia", "agnews", "MultiRC", "yahoo"],
    "order5": [*_TWISTED, "dbpedia", "agnews", "yelp", "amazon", "yahoo"],
    "order6": [*_REVIEWS, "dbpedia", "agnews", "yahoo", "MultiRC", "BoolQA", "WiC"],
}


@dataclass
class LongSequenceConfig(BaseConfig):
    """1,000 training rows a task; rates and sizes of O-LoRA's LLaMA-7B runs."""

    task_orders = ORDERS
    task_order = ORDERS["order1"]
    data_paths = suite_paths("long_sequence", ORDERS["order4"])
    task_judges = [f"{task}=choice" for task in ORDERS["order4"]]
    max_train_samples = 1000
    max_seq_len = 562  # 512 of the prompt and 50 of the answer
    eval_samples_per_task = 0  # accuracy as papers give it: on the whole test file
    num_epochs = 1
    per_device_batch_size = 4
    gradient_accumulation_steps = 8
    lr_schedule = "constant"
    warmup_ratio = 0.0
    lr_lora = 1e-3
