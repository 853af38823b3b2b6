"""The one training loop and the evaluation."""

import math
import signal
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from configs.command_line import Stopped, UserError, num_processes, rank
from methods import find_method
from methods.method import Method
from models.ds_lora import training_mode
from models.forward import (
    cross_entropy,
    evaluation,
    response_logits,
    response_tokens,
    seed_torch,
)
from training.journal import Journal
from training.logs import JsonlLog
from training.passes import Passes, progress_bar
from training.plan import count_steps, data_order
from training.processes import sum_gradients, sum_over_processes
from training.telling import Progress, Watch, Window


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


def clip_grad_norm(params: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """The norm of the gradients, which are scaled down where it exceeds `max_norm` (0: never)."""
    return nn.utils.clip_grad_norm_(params, max_norm or math.inf)


class TaskTraining:
    """Trains the branches on one task with one fresh AdamW.

    One optimizer step takes `cfg.samples_per_step` samples; its loss is the cross entropy over
    their response tokens, summed over the passes and divided by the step's response tokens.

    Args:
        method: what is done beside the supervised passes; None: nothing.
        journal: saves the state, and gives it back where the task is resumed; None: neither.
        stage: in a sequence, written with "kd_loss" into every log line.
        on_epoch_end: called with the epoch, from 1, also where `max_steps_per_task` ends it early.
    """

    def __init__(
        self,
        cfg,
        passes: Passes,
        task: str,
        samples,
        log: JsonlLog,
        *,
        method: Method | None = None,
        journal: Journal | None = None,
        stage: str | None = None,
        on_epoch_end: Callable[[int], None] | None = None,
    ):
        self.cfg, self.passes, self.task, self.samples, self.log = cfg, passes, task, samples, log
        self.method, self.journal, self.stage = method, journal, stage
        self.on_epoch_end = on_epoch_end
        self.model = model = passes.model
        self.steps_in_epoch, self.total = count_steps(cfg, len(samples))
        groups = find_method(cfg.method).param_groups(cfg, model)
        self.optimizer = torch.optim.AdamW(groups, fused=passes.device.type == "cuda")
        is_half = model.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(passes.device.type, enabled=is_half)
        self.start, self.window, self.watch = 0, Window(), Watch(task, is_half)
        self.owes_epoch_end = False
        if journal and journal.training:
            (facts, parts), journal.training = journal.training, None
            self.start, self.window = facts["step"], Window(facts["window"])
            self.watch.skipped = facts["skipped"]
            # A state of before there was such a debt has none.
            self.owes_epoch_end = facts.get("owes_epoch_end", False)
            self.scaler.load_state_dict(facts["scaler"])
            load_optimizer(self.optimizer, parts["optimizer"])

    def run(self) -> None:
        """All steps that are left.

        Raises `UserError` where a loss or gradient is not finite, before anything of it is saved,
        and `Stopped` where the run is to stop, after it was saved.
        """
        if self.owes_epoch_end:
            self.on_epoch_end((self.start - 1) // self.steps_in_epoch + 1)
        training_mode(self.model, self.cfg.num_frozen_layers)
        order: list[int] = []
        with Progress(self.task, self.total, self.start) as progress:
            for step in range(self.start, self.total):
                epoch, position = divmod(step, self.steps_in_epoch)
                if position == 0 or not order:
                    order = data_order(self.cfg.seed, self.task, epoch, len(self.samples))
                size = self.cfg.samples_per_step
                chosen = order[position * size : (position + 1) * size]
                self._step(step, epoch, [self.samples[i] for i in chosen], progress)
        self.model.eval()

    def _step(self, step: int, epoch: int, samples: list[dict], progress: Progress) -> None:
        tokens = sum(map(response_tokens, samples))
        self._set_rates(step)
        try:
            losses, passes, (aux_sum, aux_tokens) = self.passes.with_less_memory(
                partial(self._gradients, step, samples, tokens)
            )
        except Stopped:
            # The step is done again from its beginning: its gradients are not saved.
            self._save(step)
            raise
        groups = self.optimizer.param_groups
        trained = [p for group in groups for p in group["params"]]
        wishes_to_stop = bool(self.passes.stop.received)
        loss_sum, aux_sum, stops = sum_gradients(trained, sum(losses), aux_sum, wishes_to_stop)
        self.scaler.unscale_(self.optimizer)
        if self.method:
            self.method.after_backward(step)
        # Each branch by its own norm: a joint one would let distillation scale fast's update.
        norms = [clip_grad_norm(group["params"], self.cfg.max_grad_norm) for group in groups]
        self.watch.add(step, losses, passes, [loss_sum, aux_sum, *norms])
        is_last = step + 1 == self.total
        ends_epoch = (step + 1) % self.steps_in_epoch == 0 or is_last
        logs = (step + 1) % self.cfg.logging_steps == 0 or is_last
        # A wish of one process is told to all: none of them waits for one that has left.
        stopping = num_processes() > 1 and stops > 0
        saves = (step + 1) % self.cfg.save_steps == 0 or is_last or stopping
        # Before a number goes to the disk; in between, asking would have the GPU wait.
        if logs or saves or ends_epoch:
            self.watch.check()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.method:
            self.method.after_step(step)

        self.window.add("loss", loss_sum, tokens)
        self.window.add("kd", aux_sum, aux_tokens)
        self.window.tokens["all"] += sum(len(sample["input_ids"]) for sample in samples)
        progress.update()
        if logs:
            self._log(step, epoch, norms, progress)
        pause = time.perf_counter()
        if self.on_epoch_end and ends_epoch:
            # It takes long: what stops it there costs no step.
            self._save(step + 1, owes_epoch_end=True)
            self.on_epoch_end(epoch + 1)
            training_mode(self.model, self.cfg.num_frozen_layers)
        if saves:
            self._save(step + 1)
        if stopping:
            raise Stopped(self.passes.stop.received or signal.SIGTERM)
        self.window.started += time.perf_counter() - pause

    def _set_rates(self, step: int) -> None:
        cfg = self.cfg
        multiplier = lr_multiplier(cfg.lr_schedule, cfg.warmup_ratio, step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * multiplier

    def _gradients(self, step: int, samples: list[dict], tokens: int):
        """Leaves the gradients of one step; returns the losses of its passes, the ids in them, and
        what the method adds."""
        self.optimizer.zero_grad()
        seed_torch(self.cfg.seed, self.task, step, *([rank()] if rank() else []))
        aux = self.method.aux_backward(step, self._backward) if self.method else None
        losses, passes = [], []
        for indices, batch, targets in self.passes.make(samples):
            loss = cross_entropy(response_logits(self.model, **batch), targets)
            self._backward(loss / tokens)
            losses.append(loss.detach())
            passes.append([samples[i]["id"] for i in indices])
        return losses, passes, aux or (0.0, 0)

    def _backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def _log(self, step: int, epoch: int, norms: list, progress: Progress) -> None:
        groups = self.optimizer.param_groups
        line = {
            "task": self.task,
            "epoch": epoch + 1,
            "step": step + 1,
            **self.window.line(),
            **{f"lr_{group['name']}": group["lr"] for group in groups},
            **{
                f"grad_norm_{group['name']}": norm.item() if math.isfinite(norm) else None
                for group, norm in zip(groups, norms, strict=True)
            },
        }
        if self.stage is None:
            del line["kd_loss"]
        else:
            line = {"stage": self.stage, **line}
        self.log.write(**line)
        progress.report(line)
        self.window = Window()

    def _save(self, step: int, owes_epoch_end: bool = False) -> None:
        self.watch.check()
        if self.journal is None:
            return
        training = {
            "step": step,
            "skipped": self.watch.skipped,
            "window": self.window.state(),
            "scaler": self.scaler.state_dict(),
            "owes_epoch_end": owes_epoch_end,
        }
        self.journal.save(training, {"optimizer": optimizer_tensors(self.optimizer)})


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


def evaluate_loss(passes: Passes, samples, description: str = "evaluating") -> dict:
    """{"loss": nats per response token, "tokens": response tokens} of the model over `samples`.

    Weighted by tokens, whatever the passes and processes; the model's mode is restored.
    """

    def run() -> tuple[torch.Tensor, int]:
        total, tokens = torch.zeros((), dtype=torch.float64, device=passes.device), 0
        progress = progress_bar(len(samples), description, "sample")
        with evaluation(passes.model), progress:
            for indices, batch, targets in passes.make(samples):
                logits = response_logits(passes.model, **batch)
                total += cross_entropy(logits, targets).double()
                tokens += len(targets)
                progress.update(len(indices))
        return total, tokens

    total, tokens = passes.with_less_memory(run)
    local = torch.tensor([total.item(), tokens], dtype=torch.float64)
    total, tokens = sum_over_processes(local).tolist()
    tokens = int(tokens)
    loss = total / tokens
    check_finite(loss, description)
    return {"loss": loss, "tokens": tokens}


def check_finite(loss: float, description: str) -> None:
    """Raises `UserError` where a loss of evaluation is not finite."""
    if not math.isfinite(loss):
        raise UserError(f"{description}: the loss is not finite; give --dtype float32")
