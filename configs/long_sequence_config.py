"""The long sequence: 15 tasks of classification (Razdaibiedina et al. 2023, as O-LoRA has it)."""

from dataclasses import dataclass

from configs.standard_config import StandardConfig
from configs.task_files import suite_paths

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
    # Five with short texts: topic, stars, news, inference, sentiment.
    "five1": ["dbpedia", "amazon", "agnews", "MNLI", "SST-2"],
    "five2": ["SST-2", "MNLI", "agnews", "amazon", "dbpedia"],
    "five3": ["MNLI", "agnews", "SST-2", "dbpedia", "amazon"],
}


@dataclass
class LongSequenceConfig(StandardConfig):
    """1,000 training rows a task; rates and sizes are those of the standard sequence."""

    task_orders = ORDERS
    task_order = ORDERS["order1"]
    data_paths = suite_paths("long_sequence", ORDERS["order4"])
    task_judges = [f"{task}=choice" for task in ORDERS["order4"]]
    max_train_samples = 1000
