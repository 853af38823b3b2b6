"""The one training loop and the evaluation."""

import hashlib
import math
import random
import signal
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from tqdm import tqdm

from configs.base_config import Stopped, UserError, num_processes
from models.ds_lora import get_ds_lora_param_groups, get_lora_param_groups
from models.forward import cross_entropy, evaluation, response_logits
from training.saving import JsonlLog
from utils_data import IGNORE
from training.processes import gather, rank, shows_progress, sum_gradients, sum_over_processes
from training.plan import count_steps
from training.session import Session

MAX_SKIPPED_IN_A_ROW = 10


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


def seed_torch(*what) -> None:
    """Seeds torch from `what` alone: a step draws the same wherever the run started."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big"))


class _Window:
    """What happened since the last log line, on the device until a line is due."""

    def __init__(self, saved: dict | None = None):
        self.started = time.perf_counter()
        self.sums = {"loss": 0.0, "kd": 0.0, **(saved or {}).get("sums", {})}
        self.tokens = {"loss": 0, "kd": 0, "all": 0, **(saved or {}).get("tokens", {})}
        self.tokens_before = self.tokens["all"]

    def add(self, name: str, loss_sum: torch.Tensor, tokens: int) -> None:
        # In double precision, so that a window that was saved and resumed has the same sum.
        self.sums[name] = self.sums[name] + loss_sum.double()
        self.tokens[name] += tokens

    def state(self) -> dict:
        """JSON values from which the window can be made again."""
        return {"sums": {k: float(v) for k, v in self.sums.items()}, "tokens": self.tokens}

    def line(self) -> dict:
        loss, kd = (
            float(self.sums[name]) / self.tokens[name] if self.tokens[name] else None
            for name in ("loss", "kd")
        )
        seconds = time.perf_counter() - self.started
        speed = (self.tokens["all"] - self.tokens_before) / seconds
        return {"loss": loss, "kd_loss": kd, "tokens_per_second": speed}


class _Progress(tqdm):
    """A bar on a terminal, a line for each log line elsewhere."""

    def __init__(self, task: str, total: int, done: int):
        super().__init__(
            desc=task, total=total, initial=done, unit="step", disable=not shows_progress()
        )

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


class _Watch:
    """Looks for numbers that are not finite, and asks the device only when it has to.

    Args:
        task: named in errors.
        may_overflow: gradients may, MAX_SKIPPED_IN_A_ROW times: fp16 loss scaling skips the step.
        skipped: steps skipped in a row so far.
    """

    def __init__(self, task: str, may_overflow: bool, skipped: int = 0):
        self.task, self.may_overflow, self.skipped = task, may_overflow, skipped
        self._steps: list[tuple] = []

    def add(self, step: int, losses: list, passes: list[list[str]], sums: list) -> None:
        """A step's loss of each pass here, the ids in it, and [loss, KD loss, norms] of all."""
        self._steps.append((step, losses, passes, sums))

    def check(self) -> None:
        """Raises `UserError` for the first step since the last check that has such a number.

        Every process has the same sums, and so the same answer.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        sums = torch.isfinite(torch.stack([torch.stack(sums) for *_, sums in steps])).tolist()
        for (step, losses, passes, _), finite in zip(steps, sums, strict=True):
            loss_is_finite, kd_is_finite, *norms = finite
            where = f"{self.task}, step {step + 1}"
            cure = "lower the rates or max_seq_len, or give --dtype float32"
            if not loss_is_finite:
                bad = [
                    sample_id[:12]
                    for loss, ids in zip(losses, passes, strict=True)
                    if not torch.isfinite(loss)
                    for sample_id in ids
                ]
                names = ", ".join(name for listed in gather(bad) for name in listed)
                raise UserError(f"{where}: the loss is not finite on the samples {names}; {cure}")
            if not kd_is_finite:
                raise UserError(
                    f"{where}: the distillation loss is not finite; lower kd_lambda, {cure}"
                )
            if not all(norms) and not self.may_overflow:
                raise UserError(f"{where}: a gradient is not finite; {cure}")
            self.skipped = 0 if all(norms) else self.skipped + 1
            if self.skipped == MAX_SKIPPED_IN_A_ROW:
                raise UserError(
                    f"{where}: {self.skipped} overflows in a row in float16; give --dtype float32 "
                    "or bfloat16"
                )


def param_groups(cfg, model: nn.Module) -> list[dict]:
    """AdamW's groups: slow and fast for DS-LoRA, one for the methods with a single LoRA."""
    if cfg.method == "ds_lora":
        return get_ds_lora_param_groups(model, cfg.lr_slow, cfg.lr_fast, cfg.weight_decay)[0]
    return get_lora_param_groups(model, cfg.lr_lora, cfg.weight_decay)


def data_order(seed: int, task: str, epoch: int, num_samples: int) -> list[int]:
    """The order in which an epoch, from 0, visits the training samples."""
    return random.Random(f"{seed}/{task}/{epoch}").sample(range(num_samples), num_samples)


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
    """Trains the branches on `task` with one fresh AdamW.

    One optimizer step takes `cfg.samples_per_step` samples; its loss is the cross entropy over
    their response tokens, summed over the passes and divided by the step's response tokens.

    Args:
        aux: an auxiliary loss with `aux_backward(step, backward)`, which runs before the
            supervised passes, leaves exactly the gradients that it wants and returns (loss sum,
            tokens) or None.
        stage: in a sequence, written with "kd_loss" into every log line.
        on_epoch_end: called with the epoch, from 1, also where `max_steps_per_task` ends it early.

    Raises UserError where a loss or gradient is not finite, before anything of it is saved.
    """
    model, samples = session.model, session.data[task].train
    per_epoch, total = count_steps(cfg, len(samples))
    groups = param_groups(cfg, model)
    optimizer = torch.optim.AdamW(groups, fused=session.device.type == "cuda")
    scaler = torch.amp.GradScaler(session.device.type, enabled=model.dtype == torch.float16)
    start, window, watch = 0, _Window(), _Watch(task, scaler.is_enabled())
    if session.training:
        (facts, parts), session.training = session.training, None
        start, window, watch.skipped = facts["step"], _Window(facts["window"]), facts["skipped"]
        scaler.load_state_dict(facts["scaler"])
        load_optimizer(optimizer, parts["optimizer"])
    # Only now: loading a state makes new groups.
    groups = optimizer.param_groups

    def save(step: int) -> None:
        watch.check()
        training = {
            "step": step,
            "skipped": watch.skipped,
            "window": window.state(),
            "scaler": scaler.state_dict(),
        }
        session.save(training, {"optimizer": optimizer_tensors(optimizer)})

    def backward(loss):
        scaler.scale(loss).backward()

    def gradients(step: int, step_samples: list[dict], tokens: int):
        """Leaves the gradients of one step; returns the losses of its passes and the KD loss."""
        optimizer.zero_grad()
        seed_torch(cfg.seed, task, step, *([rank()] if rank() else []))
        kd = aux.aux_backward(step, backward) if aux else None
        losses, passes = [], []
        for indices, batch, targets in session.make_passes(step_samples):
            loss = cross_entropy(response_logits(model, **batch), targets)
            backward(loss / tokens)
            losses.append(loss.detach())
            passes.append([step_samples[i]["id"] for i in indices])
        return losses, passes, kd or (0.0, 0)

    model.train()
    with _Progress(task, total, start) as progress:
        for step in range(start, total):
            epoch, position = divmod(step, per_epoch)
            if position == 0 or step == start:
                order = data_order(cfg.seed, task, epoch, len(samples))
            first = position * cfg.samples_per_step
            step_samples = [samples[i] for i in order[first : first + cfg.samples_per_step]]
            tokens = sum(int((sample["labels"] != IGNORE).sum()) for sample in step_samples)
            multiplier = lr_multiplier(cfg.lr_schedule, cfg.warmup_ratio, step, total)
            for group in groups:
                group["lr"] = group["base_lr"] * multiplier

            try:
                losses, passes, (kd_sum, kd_tokens) = session.with_less_memory(
                    partial(gradients, step, step_samples, tokens)
                )
            except Stopped:
                # The step is done again from its beginning: its gradients are not saved.
                save(step)
                raise
            stop = bool(session.stop.received)
            trained = [p for group in groups for p in group["params"]]
            loss_sum, kd_sum, stops = sum_gradients(trained, sum(losses), kd_sum, stop)
            scaler.unscale_(optimizer)
            # Each branch by its own norm: a joint one would let distillation scale fast's update.
            norms = [clip_grad_norm(group["params"], cfg.max_grad_norm) for group in groups]
            watch.add(step, losses, passes, [loss_sum, kd_sum, *norms])
            last, ends_epoch = step + 1 == total, position + 1 == per_epoch or step + 1 == total
            logs = (step + 1) % cfg.logging_steps == 0 or last
            # A wish of one process is told to all: none of them waits for one that has left.
            stopping = num_processes() > 1 and stops > 0
            saves = (step + 1) % cfg.save_steps == 0 or last or stopping
            # Before a number goes to the disk; in between, asking would have the GPU wait.
            if logs or saves or ends_epoch:
                watch.check()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            window.add("loss", loss_sum, tokens)
            window.add("kd", kd_sum, kd_tokens)
            window.tokens["all"] += sum(len(sample["input_ids"]) for sample in step_samples)
            progress.update()
            if logs:
                line = {
                    "task": task,
                    "epoch": epoch + 1,
                    "step": step + 1,
                    **window.line(),
                    **{f"lr_{group['name']}": group["lr"] for group in groups},
                    **{
                        f"grad_norm_{group['name']}": norm.item() if math.isfinite(norm) else None
                        for group, norm in zip(groups, norms, strict=True)
                    },
                }
                if stage is None:
                    del line["kd_loss"]
                else:
                    line = {"stage": stage, **line}
                log.write(**line)
                progress.report(line)
                window = _Window()
            pause = time.perf_counter()
            if on_epoch_end and ends_epoch:
                on_epoch_end(epoch + 1)
                model.train()
            if saves:
                save(step + 1)
            if stopping:
                raise Stopped(session.stop.received or signal.SIGTERM)
            window.started += time.perf_counter() - pause
    model.eval()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter number and name, on the CPU."""
    return {
        f"{number:05d}.{name}": tensor.cpu()
        for number, state in optimizer.state_dict()["state"].items()
        for name, tensor in state.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Takes up what `optimizer_tensors` gave."""
    state = optimizer.state_dict()
    for name, tensor in tensors.items():
        number, _, entry = name.partition(".")
        state["state"].setdefault(int(number), {})[entry] = tensor
    optimizer.load_state_dict(state)


def evaluate_loss(session: Session, samples, description: str = "evaluating") -> dict:
    """{"loss": nats per response token, "tokens": response tokens} of the model over `samples`.

    Weighted by tokens, whatever the passes and processes; the model's mode is restored.
    """

    def run() -> tuple[torch.Tensor, int]:
        total, tokens = torch.zeros((), dtype=torch.float64, device=session.device), 0
        progress = tqdm(
            total=len(samples) // num_processes(),
            desc=description,
            unit="sample",
            leave=False,
            disable=not shows_progress(),
        )
        with evaluation(session.model), progress:
            for indices, batch, targets in session.make_passes(samples):
                logits = response_logits(session.model, **batch)
                total += cross_entropy(logits, targets).double()
                tokens += len(targets)
                progress.update(len(indices))
        return total, tokens

    local = torch.tensor(session.with_less_memory(run), dtype=torch.float64)
    total, tokens = sum_over_processes(local).tolist()
    tokens = int(tokens)
    loss = total / tokens
    if not math.isfinite(loss):
        raise UserError(f"{description}: the loss is not finite; give --dtype float32")
    return {"loss": loss, "tokens": tokens}
