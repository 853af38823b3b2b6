"""TRACE: eight tasks in several languages and domains (Wang et al. 2023)."""

from dataclasses import dataclass

from configs.base_config import BaseConfig
from configs.task_files import suite_paths

ORDERS = {
    "order1": [
        "C-STANCE",
        "FOMC",
        "MeetingBank",
        "Py150",
        "ScienceQA",
        "NumGLUE-cm",
        "NumGLUE-ds",
        "20Minuten",
    ],
}


@dataclass
class TraceConfig(BaseConfig):
    """5,000 training rows a task; the paper's rates, and the number of epochs that most have."""

    task_orders = ORDERS
    task_order = ORDERS["order1"]
    data_paths = suite_paths("trace", ORDERS["order1"])
    task_judges = [
        "C-STANCE=choice",
        "FOMC=choice",
        "MeetingBank=rouge_l",
        "Py150=rouge_l",  # the paper: edit similarity
        "ScienceQA=rouge_l",  # the paper: accuracy of the letter that comes first
        "NumGLUE-cm=number",
        "NumGLUE-ds=number",
        "20Minuten=rouge_l",  # the paper: SARI
    ]
    max_train_samples = 5000
    max_seq_len = 1536  # 1,024 of the prompt and 512 of the answer
    num_epochs = 5
    per_device_batch_size = 4
    gradient_accumulation_steps = 8
    lr_lora = 1e-4
    weight_decay = 0.0
    warmup_ratio = 0.0
