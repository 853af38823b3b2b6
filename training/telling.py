"""What training tells as it goes: log lines, a bar, numbers that are not finite."""

import time

import torch
from tqdm import tqdm

from configs.command_line import UserError, shows_progress
from training.processes import gather

MAX_SKIPPED_IN_A_ROW = 10


class Window:
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


class Progress(tqdm):
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


class Watch:
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
