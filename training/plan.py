"""What a run will take: steps, parameters, memory and disk."""

import random
import shutil
from collections import Counter
from pathlib import Path

from torch import nn
from torch.utils.data import Subset

from configs.command_line import UserError, num_processes, processes_here
from methods import find_method
from models.ds_lora import ds_lora_layers
from training.base_model import model_dtype
from utils_data import TaskData


def free_host_memory() -> int:
    """Bytes that this machine, or the container it pretends to be, has free; 0 where none says."""
    try:
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except FileNotFoundError:
        return 0
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
    except (FileNotFoundError, KeyError):
        return free
    return free if limit == "max" else min(free, int(limit) - used)


def prefix_room(cfg) -> int:
    """Bytes of host memory that this process may keep of the frozen layers' output."""
    if cfg.prefix_cache_gib >= 0:
        return int(cfg.prefix_cache_gib * 2**30)
    free = free_host_memory()
    # The rest is for logits, saved states and other programs.
    return max(0, free - max(free // 4, 4 * 2**30)) // processes_here()


def prefix_limits(cfg) -> list[float]:
    """GiB that the frozen layers' output may take [in host memory, in a store], as asked for."""
    return [cfg.prefix_cache_gib, cfg.prefix_store_gib if cfg.prefix_store else 0.0]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, frozen) parameters."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters()) - trainable


def describe_parameters(model: nn.Module) -> str:
    """Trainable and frozen parameters and where the branches are, in words."""
    trainable, frozen = count_parameters(model)
    kinds = Counter(name.rsplit(".", 1)[-1] for name in ds_lora_layers(model))
    places = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    return f"{trainable:,} trainable parameters, {frozen:,} frozen; branches beside {places}"


def disk_bytes(cfg, model: nn.Module, num_tasks: int) -> int:
    """About what a run writes: checkpoints, and states of branches, AdamW and probes."""
    trainable, _ = count_parameters(model)
    branches, tokenizer = 4 * trainable, 8 * 2**20
    vocabulary = model.config.get_text_config().vocab_size
    kept = find_method(cfg.method).kept_bytes(cfg, trainable, vocabulary, num_tasks)
    return num_tasks * cfg.num_epochs * (branches + tokenizer) + 3 * (3 * branches + kept)


def check_disk(cfg, model: nn.Module, num_tasks: int) -> None:
    """Raises `UserError` where the run's files would not fit."""
    needed, free = disk_bytes(cfg, model, num_tasks), shutil.disk_usage(cfg.save_dir).free
    if free < needed:
        raise UserError(
            f"{cfg.save_dir}: {free / 2**20:,.0f} MiB are free and a run may take "
            f"{needed / 2**20:,.0f} MiB; make room, or give another --save_dir"
        )


def report_plan(
    cfg, model: nn.Module, data: dict[str, TaskData], device, saved: dict | None
) -> None:
    """Prints what a run would do and take; `model` is without weights."""
    for task, samples in data.items():
        _, steps = count_steps(cfg, len(samples.train))
        print(f"{task}: {steps} optimizer steps, {sum(samples.train.lengths):,} tokens an epoch")
    dtype = model_dtype(cfg, device)
    width = {"none": dtype.itemsize, "8bit": 1, "4bit": 0.56}[cfg.quantization]
    trainable, frozen = count_parameters(model)
    longest = max(max(samples.train.lengths) for samples in data.values())
    tokens = max(cfg.tokens_per_pass, longest)
    config = model.config.get_text_config()
    upper = config.num_hidden_layers - cfg.num_frozen_layers
    # About 18 activations of the hidden width a layer and token are kept for the backward; the
    # logits of up to half the tokens pass through in five copies of up to four bytes.
    kept = 1 if cfg.gradient_checkpointing else 18
    activations = tokens * upper * config.hidden_size * kept * dtype.itemsize
    memory = frozen * width + 16 * trainable + activations + tokens / 2 * config.vocab_size * 16
    print(f"{device}, {dtype}: {describe_parameters(model)}")
    print(f"about {memory / 2**30:.1f} GiB of {device.type} memory with --tokens_per_pass {tokens}")
    print(f"about {disk_bytes(cfg, model, len(data)) / 2**20:,.0f} MiB of disk in {cfg.save_dir}")
    if saved:
        step = (saved["training"] or {}).get("step", 0)
        print(f"a saved state would be resumed: {saved['position']}, step {step} of the task")


def count_steps(cfg, num_samples: int) -> tuple[int, int]:
    """(optimizer steps of an epoch, of the task) for `num_samples` training samples."""
    per_epoch = -(-num_samples // cfg.samples_per_step)
    total = cfg.num_epochs * per_epoch
    return per_epoch, min(total, cfg.max_steps_per_task or total)


def data_order(seed: int, task: str, epoch: int, num_samples: int) -> list[int]:
    """The order in which an epoch, from 0, visits the training samples."""
    return random.Random(f"{seed}/{task}/{epoch}").sample(range(num_samples), num_samples)


def worth_keeping(cfg, task: str, samples):
    """Those of the training `samples` whose prefix pays to be kept: the ones that are met again.

    By this run, or where there is a store by the next one. With several processes a sample meets
    another one in each epoch.
    """
    per_epoch, total = count_steps(cfg, len(samples))
    has_store = prefix_limits(cfg)[1] > 0
    if num_processes() > 1 or (total <= per_epoch and not has_store):
        return []
    if total >= per_epoch:
        return samples
    visited = data_order(cfg.seed, task, 0, len(samples))[: total * cfg.samples_per_step]
    return Subset(samples, sorted(visited))
