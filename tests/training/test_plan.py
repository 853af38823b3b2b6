"""What a run will take, before it is begun; the device's memory: see `test_fake_cuda`."""

import re

import pytest
import torch
from helpers import ROOT, inject, make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from configs.base_config import BaseConfig
from methods import find_method, run_config
from models.forward import cross_entropy
from training.base_model import skeleton
from training.memory import run_bytes
from training.plan import count_checkpoints, count_parameters, disk_bytes, task_flops
from training.session import inject as inject_as_asked
from utils_data import TaskData

CPU = torch.device("cpu")


def test_flops_are_those_of_the_epochs_and_the_prefix_once(make_config):
    """Against torch's count, which takes attention in full: two layers of four are frozen."""
    model = inject(make_model(hidden_size=128, intermediate_size=256))
    ids = torch.randint(3, 300, (1, 8))
    with FlopCounterMode(display=False) as counter:
        cross_entropy(model(input_ids=ids, use_cache=False).logits[0], ids[0]).backward()
    counted = counter.get_total_flops()

    def planned(**changes):
        cfg = make_config(
            **{"per_device_batch_size": 1, "gradient_accumulation_steps": 1, **changes}
        )
        return task_flops(cfg, model, torch.float32, CPU, [8], 1.0)

    once = planned()
    assert once == pytest.approx(counted, rel=0.05)
    assert planned(num_epochs=3, prefix_cache_gib=0.0) == pytest.approx(3 * once)
    assert 2 * once < planned(num_epochs=3, prefix_cache_gib=1.0) < 2.8 * once
    assert planned(num_epochs=3, max_steps_per_task=1) == once


def test_disk_counts_a_checkpoint_a_task_and_answers_over_the_whole_vocabulary(make_config):
    model = inject(make_model())
    branches, states = 4 * count_parameters(model)[0], 3
    data = {task: TaskData(range(50), range(5)) for task in "ABCDE"}
    one, other = (disk_bytes(make_config(use_slsd=False), model, data, n) for n in (4, 5))
    assert other - one == branches + 8 * 2**20
    few, all_classes = (disk_bytes(make_config(kd_top_k=k), model, data, 5) for k in (1, 0))
    probes, tokens = 4, 64
    assert all_classes - few == states * probes * tokens * 6 * (320 - 1)


def test_a_task_alone_leaves_a_checkpoint_an_epoch_that_it_begins(make_config):
    data = {"A": TaskData(range(50), range(5))}  # 7 steps an epoch.
    limits = {0: 1000, 7: 1, 10: 2, 10**5: 1000}
    for limit, expected in limits.items():
        cfg = make_config(num_epochs=1000, max_steps_per_task=limit)
        assert count_checkpoints(cfg, "single_A", data) == expected
    assert count_checkpoints(cfg, "seq", data | {"B": data["A"]}) == 2


SHAPES = {
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
    | {"num_attention_heads": 40, "num_key_value_heads": 40},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    | {"num_attention_heads": 64, "num_key_value_heads": 8},
}


@pytest.mark.parametrize("size", SHAPES)
def test_the_memory_of_a_shared_model_is_what_the_readme_says(size, monkeypatch):
    """In bfloat16, with passes of 2,048 tokens half of which are response."""
    table = re.findall(rf"^\| LLaMA-2-{size}.*\|$", (ROOT / "README.md").read_text(), re.M)
    assert len(table) == 2
    config = LlamaConfig(vocab_size=32000, **SHAPES[size])
    settings = {"num_frozen_layers": config.num_hidden_layers // 2, "shard": True}
    for row, checkpointing in zip(table, (False, True), strict=True):
        told = dict(zip((2, 4, 8, 16), re.findall(r"\d+\.\d", row), strict=True))
        for processes, gib in told.items():
            monkeypatch.setenv("WORLD_SIZE", str(processes))
            make = run_config(BaseConfig, find_method("ds_lora"))
            cfg = make(**settings, gradient_checkpointing=checkpointing)
            model = inject_as_asked(cfg, skeleton(cfg, config))
            planned = run_bytes(cfg, model, torch.bfloat16, torch.device("cuda"), 2048, 0.5)
            assert f"{planned / 2**30:.1f}" == gib
