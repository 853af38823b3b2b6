"""The life cycle of a method: what is done beside the supervised training of each task."""

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from models.answers import ProbeBuffer
from models.ds_lora import (
    BRANCHES,
    branch_parameters,
    get_ds_lora_param_groups,
    get_lora_param_groups,
)

# The only stage of a method that learns all tasks at once.
JOINT = "joint"


@dataclass
class Tools:
    """What a method may use of the run.

    Attributes:
        model: with slow and fast branches, and in train mode but for what a method asks for.
        make_passes: cuts this process's share of some samples into passes: yields (their indices,
            arguments of `response_logits`, target tokens).
        gather: returns what each process gave it, by rank.
        add_up: the sum of a tensor over all processes.
        processes: how many share the samples.
        most_steps: optimizer steps of the longest task.
        with_less_memory: `work()`, and where it runs out of memory again with smaller passes: for
            what reads samples between steps, and changes nothing before it has read them all.
    """

    model: nn.Module
    make_passes: Callable
    gather: Callable
    add_up: Callable
    processes: int = 1
    most_steps: int = 0
    with_less_memory: Callable = operator.call


def branch_bytes(model: nn.Module) -> int:
    """Bytes of both branches, which are fp32."""
    return 4 * sum(p.numel() for branch in BRANCHES for p in branch_parameters(model, branch))


class Method:
    """Does nothing beside the supervised training; a method overrides what it needs.

    A method is one file in `methods/`, or anywhere else by `--method FILE.py`, with one subclass.
    A sample is {"id": hex, "input_ids", "labels": (length,) long}.

    Attributes:
        name: for `--method`; "": that of the file.
        knobs: dataclasses (`configs.command_line.Knobs`) whose fields become flags, given only with
            this method, and attributes of `cfg`.
        uses: fields of the base configuration that only some methods use, this one among them.
        is_one_lora: slow and fast train as one LoRA of rank 2r at `lr_lora`.
        readings: of the branches, which mean something for it (see `evaluation.readings`).
        meanings: reading -> what it is here, where that differs.
        needs_several_tasks: it is nothing for `train_single_task.py`.
        merges_tasks: all tasks are one stage, JOINT.
        is_one_model: the model after the last task is meant for all tasks.
        variants: name -> settings, for `run_experiments.py`; none: the method as it is.
    """

    name = ""
    knobs: tuple[type, ...] = ()
    uses: tuple[str, ...] = ("lr_lora",)
    is_one_lora = True
    readings: tuple[str, ...] = ("latest",)
    meanings: dict[str, str] = {}
    needs_several_tasks = True
    merges_tasks = False
    is_one_model = True
    variants: dict[str, dict] = {}

    def __init__(self, cfg, tools: Tools):
        self.cfg, self.tools, self.model = cfg, tools, tools.model

    @classmethod
    def param_groups(cls, cfg, model: nn.Module) -> list[dict]:
        """AdamW's groups; each keeps its own rate under "base_lr" for the schedule to multiply."""
        if cls.is_one_lora:
            return get_lora_param_groups(model, cfg.lr_lora, cfg.weight_decay)
        return get_ds_lora_param_groups(model, cfg.lr_slow, cfg.lr_fast, cfg.weight_decay)[0]

    @classmethod
    def kept_bytes(cls, cfg, model: nn.Module, sizes: list[int]) -> int:
        """About what `state` takes at its largest.

        Args:
            model: with branches; may be without weights.
            sizes: training samples of each task.
        """
        return 0

    @classmethod
    def device_bytes(cls, cfg, model: nn.Module, positions: int) -> int:
        """About what it takes on the device in a pass with so many response positions.

        Beside the passes themselves; samples and answers are kept in host memory.
        """
        return 0

    @property
    def num_kept(self) -> int:
        """Samples of earlier tasks that are kept; what else is kept shows in `state`."""
        return 0

    @property
    def probes(self) -> ProbeBuffer | None:
        """Samples of this task with the answers of the model before it, where it has such."""
        return None

    def read_task(self, task: str, samples, previous: str | None) -> str:
        """Before a task begins, with the model as the stage `previous` left it; None: the base.

        Returns a line for the user, or "".
        """
        return ""

    def begin_task(self, task: str, samples, previous: str | None) -> None:
        """Before the first step: may change the branches."""

    def auxiliary_samples(self) -> list[dict]:
        """What `aux_backward` reads during this task."""
        return []

    def aux_backward(self, step: int, backward) -> tuple[torch.Tensor, int] | None:
        """Before the supervised passes of a step: leaves exactly the gradients that it wants.

        Args:
            step: optimizer steps of this task before this one.
            backward: called with each part of the loss; carries loss scaling.

        Returns (summed loss of this process in nats, tokens of all processes) for the log, or None.
        """

    def after_backward(self, step: int) -> None:
        """Before clipping and the optimizer's step: may change the gradients, which are summed."""

    def after_step(self, step: int) -> None:
        """After the optimizer's step."""

    def end_task(self, task: str, samples, is_last: bool) -> None:
        """After the last step of each task; `is_last`: no other task follows."""

    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` needs to go on, inside a task or between two."""
        return {}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes up what `state` gave."""
