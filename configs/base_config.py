"""Every knob of an experiment, with its unit and meaning, and the command line made from them."""

import difflib
import errno
import functools
import importlib
import math
import os
import re
import signal
import sys
from argparse import ArgumentDefaultsHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch.distributed as dist
from transformers import HfArgumentParser

TASKS = ("T1_general", "T2_math", "T3_code", "T4_tool", "T5_safety")


# Fields that say where and how fast, but not what comes out: a run may be resumed with others.
NOT_RESULTS = (
    "model_name device tokens_per_pass prefix_cache_gib gradient_checkpointing logging_steps "
    "save_steps data_dir log_dir save_dir overwrite dry_run"
).split()


class UserError(Exception):
    """Something the user can mend. Each line of the message names one problem and its cure."""


class NothingToDo(Exception):
    """The run is over before it began, and rightly so; the message says why."""


class Stopped(Exception):
    """A signal asked the run to stop; it has saved what it needs to go on."""

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number


def num_processes() -> int:
    """Processes of this run, as torchrun or accelerate launch started them."""
    return int(os.environ.get("WORLD_SIZE", 1))


def knob(default, help: str):
    """A dataclass field with its help text; lists and functions become default factories."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    if callable(default):
        return field(default_factory=default, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def wrong_types(config) -> list[str]:
    """A line for every field of the dataclass instance that is not of its declared type."""
    problems = []
    for name, declared in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(declared) is Literal:
            if value not in get_args(declared):
                problems.append(f"{name} is {value!r}: give {', '.join(get_args(declared))}")
        elif declared == list[str]:
            if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
                problems.append(f"{name} is {value!r}: give a list of names")
        # Python counts True as an int and not 1 as a float.
        elif type(value) is not declared and not (declared is float and type(value) is int):
            problems.append(f"{name} is {value!r}: give a value of type {declared.__name__}")
    return problems


@dataclass
class BaseConfig:
    """The full-size experiment: LLaMA-2-7B on one GPU. To change an experiment, change this first.

    Raises `UserError` on construction, one line for every impossible value.
    """

    model_name: str = knob(
        "meta-llama/Llama-2-7b-hf", "base model: hub id, local folder, or a .gguf file"
    )
    quantization: Literal["none", "8bit", "4bit"] = knob(
        "none", "how the frozen base is held; 8bit and 4bit need bitsandbytes"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob(
        "auto",
        "of the frozen base; auto: bfloat16 where the GPU has it, else float16; float32 on CPU",
    )
    device: str = knob(
        "auto", "auto: the GPU with the most free memory, else cpu; or cpu, cuda, cuda:1"
    )

    lora_r: int = knob(8, "rank of each of the two branches")
    lora_alpha: int = knob(32, "each branch's output is scaled by lora_alpha / lora_r")
    lora_dropout: float = knob(0.05, "probability, on the branches' input; 0: none")
    lora_target_modules: list[str] = knob(
        ["q_proj", "v_proj"], "a linear layer whose name contains one of these gets the branches"
    )
    num_frozen_layers: int = knob(
        16, "bottom decoder layers left untouched; 0: branches in every layer"
    )

    lr_slow: float = knob(1e-5, "AdamW rate of the slow branch, which every task shares")
    lr_fast: float = knob(5e-5, "AdamW rate of the fast branch, which follows the task at hand")
    weight_decay: float = knob(0.01, "AdamW decay of both branches; 0: none")
    lr_schedule: Literal["constant", "linear", "cosine"] = knob(
        "cosine", "multiplier of both rates over a task, from 1 to 0; cosine is Stanford Alpaca's"
    )
    warmup_ratio: float = knob(
        0.03, "share of a task's steps in which both rates rise from 0 (Stanford Alpaca's 0.03)"
    )
    max_grad_norm: float = knob(
        1.0, "each branch is clipped to this gradient norm by itself; 0: no clipping"
    )
    fast_init: Literal["continue", "fresh"] = knob(
        "continue", "the next task's fast branch: the last task's, or a new one"
    )

    method: Literal["ds_lora", "seq_lora", "replay", "ewc", "lwf", "bank", "joint"] = knob(
        "ds_lora",
        "of train_slsd_seq.py; all but ds_lora train one LoRA of rank 2 lora_r at lr_lora: "
        "alone (seq_lora), with replay, EWC or LwF, a new one per task (bank), or on all tasks at "
        "once (joint)",
    )
    lr_lora: float = knob(5e-5, "AdamW rate of the one LoRA of the other methods")
    replay_fraction: float = knob(0.02, "replay: share of each earlier task that is kept")
    replay_batch_size: int = knob(4, "replay: kept samples learned again at each step")
    ewc_lambda: float = knob(
        1000.0, "ewc: weight of the penalty, half the Fisher times the squared change"
    )

    use_slsd: bool = knob(True, "ds_lora: distil the slow branch, from task 2 on")
    kd_lambda: float = knob(
        1.0, "weight of the distillation loss in the slow branch's loss; 0: off"
    )
    kd_temperature: float = knob(
        1.0, "softens teacher and student; the loss is scaled by its square"
    )
    kd_top_k: int = knob(
        64, "teacher logits kept per response token; all others are one class; 0: the vocabulary"
    )
    kd_batch_size: int = knob(4, "probes distilled at a step")
    kd_every: int = knob(4, "optimizer steps from one distillation to the next")
    kd_branches: Literal["slow", "all"] = knob("slow", "the branches that distillation moves")
    kd_forward: Literal["joint", "slow"] = knob(
        "joint", "what answers as the student: both branches, or the slow one alone"
    )
    kd_probes: Literal["current", "replay"] = knob(
        "current",
        "distilled: the probes of the current task; replay: those of each earlier task too, with "
        "the answers of the model that had just learned it",
    )
    probe_choice: Literal["entropy", "random"] = knob(
        "entropy", "the surest samples become probes, or any"
    )
    probe_size_per_task: int = knob(500, "most probes kept per task")
    probe_pool_factor: int = knob(
        2, "the probes are chosen among this many times probe_size_per_task samples"
    )
    entropy_threshold: float = knob(
        2.0,
        "nats per response token; a surer sample may be a probe. 2.0 is a choice among about 7 "
        "tokens; above ln(vocabulary) it keeps all",
    )

    task_order: list[str] = knob(list(TASKS), "tasks in the order of learning")
    use_toy_data: bool = knob(
        False, "the small files in data_dir instead of those in data_dir/full"
    )
    data_dir: str = knob("data", "folder of T*.jsonl and full/T*_full.jsonl")
    holdout_fraction: float = knob(0.1, "share of each task that is never trained on but evaluated")
    max_seq_len: int = knob(2048, "tokens per sample; the prompt's end gives way first")
    max_train_samples: int = knob(0, "per task, chosen by seed; 0: all")
    eval_samples_per_task: int = knob(
        200, "held-out samples evaluated per task: enough for +-0.05 nats; 0: all"
    )

    all_readings: bool = knob(
        False,
        "evaluate every reading of the branches after each stage, and the tasks not yet seen too",
    )

    generate: bool = knob(
        False, "after each stage answer the held-out samples of the tasks seen, and score them"
    )

    per_device_batch_size: int = knob(
        1, "times gradient_accumulation_steps and processes: the samples of an optimizer step"
    )
    gradient_accumulation_steps: int = knob(
        16, "see per_device_batch_size; how samples are cut into passes is tokens_per_pass"
    )
    tokens_per_pass: int = knob(
        2048,
        "tokens, padding included, of one forward pass: memory, and no results but dropout masks",
    )
    prefix_cache_gib: float = knob(
        -1.0,
        "GiB of host memory for the frozen layers' output, which later epochs, evaluation and "
        "probes start from; -1: what is free, with a margin; 0: none",
    )
    gradient_checkpointing: bool = knob(
        False, "recompute the upper layers in the backward: less memory, a third more time"
    )
    num_epochs: int = knob(3, "passes over each task's training samples (Stanford Alpaca's 3)")
    max_steps_per_task: int = knob(
        0, "optimizer steps, where fewer than the epochs give; 0: no limit"
    )
    seed: int = knob(42, "of branch weights, data order, dropout and probe choice")

    logging_steps: int = knob(10, "optimizer steps from one line of the training log to the next")
    save_steps: int = knob(
        50, "optimizer steps from one saved state to the next, to resume from after a crash"
    )
    log_dir: str = knob("logs", "folder of the loss logs, the summary and the pictures")
    save_dir: str = knob("checkpoints", "folder of the adapters, one sub-folder a stage")
    overwrite: bool = knob(
        False, "start afresh and replace the logs and checkpoints of an earlier run"
    )
    dry_run: bool = knob(False, "check everything, print what would be done, and train nothing")

    def __post_init__(self):
        """Collects every impossible value and raises once."""
        problems = wrong_types(self)
        if problems:
            raise UserError("\n".join(problems))

        def need(condition, names: str, what: str):
            if not condition:
                given = ", ".join(f"{name} is {getattr(self, name)!r}" for name in names.split())
                problems.append(f"{given}: {what}")

        at_least_1 = (
            "lora_r lora_alpha kd_batch_size kd_every probe_size_per_task probe_pool_factor "
            "per_device_batch_size gradient_accumulation_steps tokens_per_pass num_epochs "
            "logging_steps save_steps replay_batch_size"
        )
        at_least_0 = (
            "num_frozen_layers kd_top_k max_train_samples eval_samples_per_task max_steps_per_task "
            "seed kd_lambda ewc_lambda weight_decay max_grad_norm entropy_threshold"
        )
        for name in at_least_1.split():
            need(getattr(self, name) >= 1, name, "give 1 or more")
        for name in at_least_0.split():
            value = getattr(self, name)
            need(math.isfinite(value) and value >= 0, name, "give 0 or a positive number")
        for name in ("lr_slow", "lr_fast", "lr_lora", "kd_temperature"):
            value = getattr(self, name)
            need(math.isfinite(value) and value > 0, name, "give a positive number")
        need(
            self.prefix_cache_gib == -1 or 0 <= self.prefix_cache_gib < math.inf,
            "prefix_cache_gib",
            "give -1, 0 or a positive number",
        )
        need(0 < self.replay_fraction <= 1, "replay_fraction", "give more than 0, at most 1")
        need(
            self.kd_forward == "joint" or self.kd_branches == "slow",
            "kd_forward kd_branches",
            "the slow branch alone has no gradient for the fast one; give --kd_branches slow",
        )
        need(0 <= self.lora_dropout < 1, "lora_dropout", "give 0 or more, below 1")
        need(0 <= self.warmup_ratio <= 1, "warmup_ratio", "give a number from 0 to 1")
        need(0 < self.holdout_fraction < 1, "holdout_fraction", "give more than 0 and below 1")
        need(self.max_seq_len >= 16, "max_seq_len", "give 16 or more: the template alone takes ten")
        need(self.seed < 2**63, "seed", "give a number below 2**63")
        for name in ("model_name", "data_dir", "log_dir", "save_dir"):
            need(getattr(self, name).strip(), name, "give a name")
        need(
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device),
            "device",
            "give auto, cpu, cuda or cuda:N",
        )
        need(
            self.lora_target_modules and all(self.lora_target_modules),
            "lora_target_modules",
            "give one or more names, such as q_proj",
        )
        order = self.task_order
        need(
            order and set(order) <= set(TASKS) and len(set(order)) == len(order),
            "task_order",
            f"give each task once, out of {', '.join(TASKS)}",
        )
        if problems:
            raise UserError("\n".join(problems))

    @property
    def data_paths(self) -> dict[str, dict[str, str]]:
        """task -> {"toy": path, "full": path}, both below `data_dir`."""
        root = Path(self.data_dir)
        return {
            task: {
                "toy": str(root / f"{task}.jsonl"),
                "full": str(root / "full" / f"{task}_full.jsonl"),
            }
            for task in TASKS
        }

    def data_path(self, task: str) -> str:
        """The file that this run reads for `task`."""
        return self.data_paths[task]["toy" if self.use_toy_data else "full"]

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step, over all processes."""
        return self.per_device_batch_size * self.gradient_accumulation_steps * num_processes()


class _Parser(HfArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def parse_dataclasses(argv, *types, description: str, extra=()) -> tuple:
    """Instances of the dataclasses `types`, filled from `argv` (default: `sys.argv[1:]`).

    Every field is a flag of its own name. `extra` holds (flag, keyword arguments) of options that
    belong to no dataclass. Raises `UserError` on an unknown or malformed option.
    """
    parser = _Parser(
        types,
        description=description,
        allow_abbrev=False,
        # A fixed width keeps the help the same wherever it is printed.
        formatter_class=lambda prog: ArgumentDefaultsHelpFormatter(prog, width=100),
        usage="%(prog)s [--option value ...]",
    )
    for flag, kwargs in extra:
        parser.add_argument(flag, **kwargs)
    argv = sys.argv[1:] if argv is None else argv
    *parsed, unknown = parser.parse_args_into_dataclasses(
        list(argv), return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        hint = f"did you mean {close[0]}?" if close else "see --help"
        raise UserError(f"unknown option {unknown[0]}; {hint}")
    return tuple(parsed[: len(types)])


def parse_config(argv, *more_types, description: str) -> tuple:
    """(config, *instances of `more_types`) from the command line.

    `--config NAME` takes the dataclass in `configs/NAME_config.py`; other flags change its fields.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = "base"
    for i, word in enumerate(argv):
        if word == "--config":
            name = argv[i + 1] if i + 1 < len(argv) else ""
        elif word.startswith("--config="):
            name = word.split("=", 1)[1]
    options = {"default": "base", "metavar": "NAME", "help": "takes configs/NAME_config.py"}
    return parse_dataclasses(
        argv,
        _config_class(name),
        *more_types,
        description=description,
        extra=[("--config", options)],
    )


def _config_class(name: str) -> type[BaseConfig]:
    folder = Path(__file__).parent
    names = sorted(path.name.removesuffix("_config.py") for path in folder.glob("*_config.py"))
    if name not in names:
        raise UserError(
            f"--config {name}: there is no such file in configs/; give {' or '.join(names)}"
        )
    module = importlib.import_module(f"configs.{name}_config")
    found = [
        thing
        for thing in vars(module).values()
        if isinstance(thing, type)
        and issubclass(thing, BaseConfig)
        and thing.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise UserError(
            f"configs/{name}_config.py: define one subclass of BaseConfig, not {len(found)}"
        )
    return found[0]


def command_line(main):
    """Decorates a script's `main(argv=None)`: returns its exit code.

    0 done; 2 on `UserError`, which prints `error: ...` a line, and where the disk fails; 130 on
    Ctrl-C and 143 on SIGTERM.
    """

    @functools.wraps(main)
    def wrapped(argv=None) -> int:
        try:
            main(argv)
        except UserError as error:
            # Until the processes of a run have joined, each of them says the same.
            if int(os.environ.get("RANK", 0)) == 0 or dist.is_initialized():
                for line in str(error).splitlines():
                    print(f"error: {line}", file=sys.stderr)
            return 2
        except NothingToDo as reason:
            print(reason)
        except Stopped as stop:
            print(f"{stop}; the same command goes on from the last saved step", file=sys.stderr)
            return stop.exit_code
        except OSError as error:
            # A full or read-only disk is the user's to mend; any other fault is ours.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise
            print(f"error: {error}; the last saved state is whole", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        return 0

    return wrapped
