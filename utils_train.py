"""The one training loop, the evaluation, and what both scripts do before they train."""

import hashlib
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from configs.base_config import UserError
from models.ds_lora import find_decoder_layers, get_ds_lora_param_groups, replace_with_ds_lora
from models.slsd import evaluation, response_logits
from utils_checkpoint import JsonlLog, check_outputs, clear_outputs
from utils_data import IGNORE, TaskData, make_passes, prepare_task, read_jsonl
from utils_model import check_model, describe_base, load_model_and_tokenizer, select_device


@dataclass
class Session:
    """What a script trains with.

    `make_passes(samples)` cuts samples into passes on the device, see `utils_data.make_passes`.
    """

    model: nn.Module
    tokenizer: object
    device: torch.device
    data: dict[str, TaskData]
    make_passes: Callable
    about_base: dict


def _gather(checks: list[Callable]) -> list:
    """The results of all `checks`, or one `UserError` with the problems of all of them."""
    results, problems = [], []
    for check in checks:
        try:
            results.append(check())
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return results


def set_up(cfg, run_name: str, tasks: list[str]) -> Session:
    """Checks what can be checked, then loads model and data and puts the branches in.

    Outputs of an earlier run `run_name` are removed once nothing stands in the way. Raises
    `UserError` with all problems that show before the model's weights are loaded.
    """
    _, _, *rows = _gather(
        [
            partial(check_outputs, cfg, run_name),
            partial(check_model, cfg),
            *(partial(read_jsonl, cfg.data_path(task)) for task in tasks),
        ]
    )
    device = select_device(cfg.device)
    model, tokenizer = load_model_and_tokenizer(cfg, device)
    data = _gather(
        [partial(prepare_task, cfg, tokenizer, *pair) for pair in zip(tasks, rows, strict=True)]
    )
    torch.manual_seed(cfg.seed)
    try:
        replace_with_ds_lora(
            model,
            cfg.lora_target_modules,
            cfg.lora_r,
            cfg.lora_alpha,
            cfg.lora_dropout,
            cfg.num_frozen_layers,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    if cfg.gradient_checkpointing:
        enable_checkpointing(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trainable
    print(f"{device}, {model.dtype}: {trainable:,} trainable parameters, {frozen:,} frozen")
    clear_outputs(cfg, run_name)
    cut = partial(
        make_passes,
        tokens_per_pass=cfg.tokens_per_pass,
        pad_token_id=tokenizer.pad_token_id,
        device=device,
    )
    return Session(
        model, tokenizer, device, dict(zip(tasks, data, strict=True)), cut, describe_base(cfg)
    )


def enable_checkpointing(model: nn.Module) -> None:
    """Recomputes the layers with branches in the backward; the frozen bottom stays outside it."""
    # The reentrant kind gives `backward(inputs=...)` nothing, without a word.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    # transformers 5 makes the embeddings require grad, which would drag the backward through the
    # frozen layers.
    model.disable_input_require_grads()
    for layer in find_decoder_layers(model)[1]:
        if not any(p.requires_grad for p in layer.parameters()):
            layer.gradient_checkpointing = False


def lr_multiplier(schedule: str, warmup_ratio: float, step: int, total_steps: int) -> float:
    """Factor of every group's base rate at `step` (from 0) of `total_steps`."""
    warmup = math.ceil(warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[schedule]


def count_steps(cfg, num_samples: int) -> tuple[int, int]:
    """(optimizer steps of an epoch, of the task) for `num_samples` training samples."""
    per_epoch = math.ceil(num_samples / cfg.samples_per_step)
    total = cfg.num_epochs * per_epoch
    return per_epoch, min(total, cfg.max_steps_per_task or total)


def seed_torch(*what) -> None:
    """Seeds torch from `what` alone: a step draws the same wherever the run started."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big"))


class _Window:
    """What happened since the last log line, on the device until a line is due."""

    def __init__(self):
        self.started = time.perf_counter()
        self.loss_sum, self.tokens = 0.0, 0
        self.kd_sum, self.kd_tokens = 0.0, 0
        self.all_tokens = 0

    def line(self) -> dict:
        return {
            "loss": float(self.loss_sum) / self.tokens,
            "kd_loss": float(self.kd_sum) / self.kd_tokens if self.kd_tokens else None,
            "tokens_per_second": self.all_tokens / (time.perf_counter() - self.started),
        }


class _Progress(tqdm):
    """A bar on a terminal, a line for each log line elsewhere."""

    def __init__(self, task: str, total: int):
        super().__init__(desc=task, total=total, unit="step", disable=not sys.stderr.isatty())

    def report(self, line: dict) -> None:
        """Shows what is logged: loss and kd_loss in nats per response token."""
        kd = line.get("kd_loss")
        shown = {
            "loss": f"{line['loss']:.3f}",
            **({} if kd is None else {"kd": f"{kd:.4f}"}),
            "tokens/s": f"{line['tokens_per_second']:.0f}",
        }
        if self.disable:
            text = "  ".join(f"{key} {value}" for key, value in shown.items())
            print(f"{line['task']}  step {line['step']}/{self.total}  {text}", flush=True)
        else:
            self.set_postfix(shown)


def clip_grad_norm(params: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """The norm of the gradients, which are scaled down where it exceeds `max_norm` (0: never)."""
    return nn.utils.clip_grad_norm_(params, max_norm or math.inf)


def _check_finite(where: str, values: torch.Tensor, passes: list[list[str]], may_overflow: bool):
    """`values` holds a loss for each of `passes`, then the distillation loss and the two norms."""
    finite = torch.isfinite(values).tolist()
    losses, kd_is_finite, norms = (
        finite[: len(passes)],
        finite[len(passes)],
        finite[len(passes) + 1 :],
    )
    cure = "lower lr_slow, lr_fast or max_seq_len, or give --dtype float32"
    for is_finite, ids in zip(losses, passes, strict=True):
        if not is_finite:
            names = ", ".join(sample_id[:12] for sample_id in ids)
            raise UserError(f"{where}: the loss is not finite on the samples {names}; {cure}")
    if not kd_is_finite:
        raise UserError(f"{where}: the distillation loss is not finite; lower kd_lambda, {cure}")
    # With fp16 loss scaling an overflow is expected: the scaler skips the step and scales less.
    if not all(norms) and not may_overflow:
        raise UserError(f"{where}: a gradient is not finite; {cure}")


def train_task(
    cfg,
    session: Session,
    task: str,
    log: JsonlLog,
    *,
    aux=None,
    stage: str | None = None,
    on_epoch_end: Callable[[int], None] | None = None,
) -> None:
    """Trains both branches on `task` with one fresh AdamW.

    One optimizer step takes `cfg.samples_per_step` samples; its loss is the cross entropy over
    their response tokens, summed over the passes and divided by the step's response tokens.

    Args:
        aux: an auxiliary loss with `aux_backward(step, backward)`, which runs before the
            supervised passes, leaves exactly the gradients that it wants and returns (loss sum,
            tokens) or None.
        stage: in a sequence, written with "kd_loss" into every log line.
        on_epoch_end: called with the epoch, from 1, also where `max_steps_per_task` ends it early.

    Raises UserError where a loss or gradient is not finite, before it reaches the weights.
    """
    model, samples = session.model, session.data[task].train
    per_epoch, total = count_steps(cfg, len(samples))
    groups, slow, fast = get_ds_lora_param_groups(model, cfg.lr_slow, cfg.lr_fast, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups)
    scaler = torch.amp.GradScaler(session.device.type, enabled=model.dtype == torch.float16)

    def backward(loss):
        scaler.scale(loss).backward()

    window = _Window()
    model.train()
    with _Progress(task, total) as progress:
        for step in range(total):
            epoch, position = divmod(step, per_epoch)
            if position == 0:
                order = random.Random(f"{cfg.seed}/{task}/{epoch}").sample(
                    range(len(samples)), len(samples)
                )
            first = position * cfg.samples_per_step
            step_samples = [samples[i] for i in order[first : first + cfg.samples_per_step]]
            tokens = sum(int((sample["labels"] != IGNORE).sum()) for sample in step_samples)
            multiplier = lr_multiplier(cfg.lr_schedule, cfg.warmup_ratio, step, total)
            for group in groups:
                group["lr"] = group["base_lr"] * multiplier
            seed_torch(cfg.seed, task, step)

            kd = aux.aux_backward(step, backward) if aux else None
            kd_sum, kd_tokens = kd or (torch.zeros((), device=session.device), 0)
            losses, passes = [], []
            for indices, batch in session.make_passes(step_samples):
                logits, targets = response_logits(model, **batch)
                loss = F.cross_entropy(logits.float(), targets, reduction="sum")
                backward(loss / tokens)
                losses.append(loss.detach())
                passes.append([step_samples[i]["id"] for i in indices])
            scaler.unscale_(optimizer)
            norms = [clip_grad_norm(params, cfg.max_grad_norm) for params in (slow, fast)]
            values = torch.stack([*losses, kd_sum, *norms])
            _check_finite(f"{task}, step {step + 1}", values, passes, scaler.is_enabled())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            window.loss_sum += sum(losses)
            window.tokens += tokens
            window.kd_sum += kd_sum
            window.kd_tokens += kd_tokens
            window.all_tokens += sum(len(sample["input_ids"]) for sample in step_samples)
            progress.update()
            if (step + 1) % cfg.logging_steps == 0 or step + 1 == total:
                line = {
                    "task": task,
                    "epoch": epoch + 1,
                    "step": step + 1,
                    **window.line(),
                    "lr_slow": groups[0]["lr"],
                    "lr_fast": groups[1]["lr"],
                    "grad_norm_slow": norms[0].item(),
                    "grad_norm_fast": norms[1].item(),
                }
                if stage is None:
                    del line["kd_loss"]
                else:
                    line = {"stage": stage, **line}
                log.write(**line)
                progress.report(line)
                window = _Window()
            if on_epoch_end and (position + 1 == per_epoch or step + 1 == total):
                pause = time.perf_counter()
                on_epoch_end(epoch + 1)
                model.train()
                window.started += time.perf_counter() - pause
    model.eval()


def evaluate_loss(session: Session, samples, description: str = "evaluating") -> dict:
    """{"loss": nats per response token, "tokens": response tokens} of the model over `samples`.

    Weighted by tokens, whatever the passes; the model's mode is restored.
    """
    total, tokens = 0.0, 0
    progress = tqdm(
        total=len(samples),
        desc=description,
        unit="sample",
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    with evaluation(session.model), progress:
        for indices, batch in session.make_passes(samples):
            logits, targets = response_logits(session.model, **batch)
            total += F.cross_entropy(logits.float(), targets, reduction="sum").double()
            tokens += len(targets)
            progress.update(len(indices))
    loss = float(total) / tokens
    if not math.isfinite(loss):
        raise UserError(f"{description}: the loss is not finite; give --dtype float32")
    return {"loss": loss, "tokens": tokens}
