"""What a run will take, before it is begun; the device's memory: see `test_fake_cuda`."""

import pytest
import torch
from helpers import inject, make_model
from torch.utils.flop_counter import FlopCounterMode

from models.forward import cross_entropy
from training.plan import count_parameters, disk_bytes, task_flops
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
