"""What a run will take: steps, hours, parameters, memory and disk."""

import math
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import psutil
import torch
from torch import nn
from torch.utils.data import Subset

from configs.command_line import UserError, num_processes, processes_here
from methods import find_method
from methods.method import branch_bytes
from models.ds_lora import ds_lora_layers
from models.forward import response_tokens
from training.device import model_dtype
from training.memory import Shapes, flops_per_token, run_bytes
from utils_data import TaskData


def free_host_memory() -> int:
    """Bytes that this machine, or the container it pretends to be, has free."""
    free = psutil.virtual_memory().available
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


def count_checkpoints(cfg, run_name: str, data: dict[str, TaskData]) -> int:
    """How many a run leaves: a sequence one a task, a task alone one an epoch that it begins."""
    if run_name == "seq":
        return len(data)
    (samples,) = data.values()
    per_epoch, steps = count_steps(cfg, len(samples.train))
    return -(-steps // per_epoch)


def disk_bytes(cfg, model: nn.Module, data: dict[str, TaskData], checkpoints: int) -> int:
    """About what a run writes: `checkpoints`, and states of branches, AdamW and the method."""
    branches, tokenizer = branch_bytes(model), 8 * 2**20
    sizes = [len(samples.train) for samples in data.values()]
    kept = find_method(cfg.method).kept_bytes(cfg, model, sizes)
    # Two states, and the one that is being written.
    return checkpoints * (branches + tokenizer) + 3 * (3 * branches + kept)


def check_disk(cfg, needed: int) -> None:
    """Raises `UserError` where the run's files of `needed` bytes would not fit."""
    free = shutil.disk_usage(cfg.save_dir).free
    if free < needed:
        raise UserError(
            f"{cfg.save_dir}: {free / 2**20:,.0f} MiB are free and a run may take "
            f"{needed / 2**20:,.0f} MiB; make room, or give another --save_dir"
        )


def report_plan(
    cfg, model: nn.Module, data: dict[str, TaskData], device, disk: int, saved: dict | None
) -> None:
    """Prints what a run would do and take; `model` is without weights."""
    dtype = model_dtype(cfg, device)
    print(f"{device}, {dtype}: {describe_parameters(model)}")
    rate = cfg.device_tflops * 1e12 or matrix_rate(device, dtype)
    shares = {task: response_share(samples.train) for task, samples in data.items()}
    seconds = {}
    for task, samples in data.items():
        _, steps = count_steps(cfg, len(samples.train))
        flops = task_flops(cfg, model, dtype, device, samples.train.lengths, shares[task])
        seconds[task] = flops / num_processes() / rate
        tokens = sum(samples.train.lengths)
        print(
            f"{task}: {steps} optimizer steps, {tokens:,} tokens an epoch, {_hours(seconds[task])}"
        )
    how = "given" if cfg.device_tflops else "measured"
    print(
        f"training takes {_hours(sum(seconds.values()))} or more, at {rate / 1e12:.3g} TFLOP/s "
        f"({how}), the rate of matrix products; evaluation comes on top"
    )
    longest = max(max(samples.train.lengths) for samples in data.values())
    tokens = max(cfg.tokens_per_pass, longest)
    memory = run_bytes(cfg, model, dtype, device, tokens, max(shares.values()))
    where = f"{device.type} memory" + (" in each process" if cfg.shard else "")
    print(f"about {memory / 2**30:.1f} GiB of {where} with --tokens_per_pass {tokens}")
    print(f"about {disk / 2**20:,.0f} MiB of disk in {cfg.save_dir}")
    if saved:
        step = (saved["training"] or {}).get("step", 0)
        print(f"a saved state would be resumed: {saved['position']}, step {step} of the task")


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 360 else f"{seconds / 60:.1f} min"


def response_share(samples) -> float:
    """Response tokens by tokens, of the first 200 samples."""
    chosen = [samples[i] for i in range(min(200, len(samples)))]
    return sum(map(response_tokens, chosen)) / sum(len(s["input_ids"]) for s in chosen)


def task_flops(cfg, model: nn.Module, dtype, device, lengths: list[int], share: float) -> float:
    """FLOPs of training on a task, without padding.

    Where the frozen layers' output is kept they are run in one epoch only, and the rest starts from
    there as far as there is room.
    """
    shapes, total = Shapes.of(model, dtype, device), sum(lengths)
    # Tokens attend within their sample: a long one weighs more.
    length = sum(n * n for n in lengths) / total
    frozen, upper = flops_per_token(model, shapes, length, share, cfg.gradient_checkpointing)
    per_epoch, steps = count_steps(cfg, len(lengths))
    epochs = steps / per_epoch
    needed = total * shapes.hidden * shapes.itemsize
    room = prefix_limits(cfg)[1] * 2**30 or prefix_room(cfg)
    held = min(1.0, room / needed) if worth_keeping(cfg, "", lengths) else 0.0
    frozen_epochs = epochs - held * max(0.0, epochs - 1)
    return total * (frozen * frozen_epochs + upper * epochs)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of large matrix products on `device`: the best of five."""
    size = 8192 if device.type == "cuda" else 1024
    a, best = torch.randn(size, size, device=device).to(dtype), math.inf
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


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
