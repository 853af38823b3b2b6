"""What a run holds while it trains: model, data, logs, saved states, and the wish to stop."""

import contextlib
import dataclasses
import gc
import os
import shutil
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from configs.base_config import NOT_RESULTS, NothingToDo, Stopped, UserError
from models.ds_lora import BRANCHES, branch_parameters, find_decoder_layers, replace_with_ds_lora
from utils_checkpoint import (
    JsonlLog,
    RunState,
    check_outputs,
    clear_outputs,
    file_sha256,
    run_lock,
    state_folder,
)
from utils_data import TaskData, make_passes, prepare_task, read_jsonl
from utils_model import (
    check_device,
    check_model,
    describe_base,
    load_model,
    load_tokenizer,
    model_dtype,
    select_device,
    skeleton,
)


class StopSignals:
    """Turns the first Ctrl-C or SIGTERM into `Stopped` at the next `check()`; a second kills."""

    def __init__(self):
        self.received = 0

    def check(self) -> None:
        """Raises `Stopped` where a signal has come."""
        if self.received:
            raise Stopped(self.received)

    def _receive(self, number, _frame) -> None:
        self.received = number
        # Not print: a handler may interrupt one.
        os.write(2, b"\nstopping after this pass; a second signal stops at once\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    @contextlib.contextmanager
    def installed(self):
        """Within the block signals are kept for `check()`."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Session:
    """What a script trains with.

    Attributes:
        data: task -> its samples.
        position: where the run is, for the script to read and write: JSON values.
        training: what the loop saved of a task that is to be resumed (facts, parts), else None.
    """

    def __init__(
        self,
        cfg,
        model: nn.Module,
        tokenizer,
        device: torch.device,
        data: dict[str, TaskData],
        about_base: dict,
        state: RunState,
        identity: dict,
        stop: StopSignals,
    ):
        self.cfg, self.model, self.tokenizer, self.device = cfg, model, tokenizer, device
        self.data, self.about_base = data, about_base
        self.stop, self.tokens_per_pass = stop, cfg.tokens_per_pass
        self.position: dict = {}
        self.training: tuple[dict, dict] | None = None
        self._state, self._identity = state, identity
        self._logs: dict[str, JsonlLog] = {}
        self._log_sizes: dict[str, int] = {}
        self._samples_in_pass = 0

    def make_passes(self, samples):
        """Cuts samples into passes on the device, see `utils_data.make_passes`.

        Raises `Stopped` between passes where the run is to stop.
        """
        pad = self.tokenizer.pad_token_id
        for indices, batch in make_passes(samples, self.tokens_per_pass, pad, self.device):
            self.stop.check()
            self._samples_in_pass = len(indices)
            yield indices, batch

    def with_less_memory(self, work: Callable):
        """`work()`; where it runs out of GPU memory, again with passes of half the tokens.

        Raises `UserError` where a single sample is too much.
        """
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                pass
            # Outside the handler, whose traceback holds the tensors of the failed pass.
            self.model.zero_grad()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if self._samples_in_pass <= 1:
                raise UserError(
                    "out of GPU memory with one sample a pass: give --gradient_checkpointing true, "
                    "a smaller --max_seq_len, --quantization 4bit, or a larger --num_frozen_layers"
                )
            self.tokens_per_pass = max(1, self.tokens_per_pass // 2)
            print(f"out of GPU memory: going on with --tokens_per_pass {self.tokens_per_pass}")

    def log(self, name: str) -> JsonlLog:
        """Opens `name`.jsonl in the log folder, where a resumed run left it."""
        path = Path(self.cfg.log_dir) / f"{name}.jsonl"
        self._logs[name] = JsonlLog(path, self._log_sizes.get(name, 0))
        return self._logs[name]

    def close(self) -> None:
        for log in self._logs.values():
            log.close()

    def save(self, training: dict | None = None, parts: dict | None = None) -> None:
        """Saves the branches, the position and, inside a task, what the loop needs to go on."""
        branches = {
            f"{branch}.{i:04d}": parameter.detach().cpu().contiguous()
            for branch in BRANCHES
            for i, parameter in enumerate(branch_parameters(self.model, branch))
        }
        self._save(training, {"branches": branches, **(parts or {})})

    def finish(self) -> None:
        """Notes that the run is finished."""
        self.position["finished"] = True
        self._save(None, {}, keep=1)

    def _save(self, training, parts, keep: int = 2) -> None:
        facts = {
            "identity": self._identity,
            "position": self.position,
            "training": training,
            "logs": {name: log.size() for name, log in self._logs.items()},
            "tokens_per_pass": {"given": self.cfg.tokens_per_pass, "used": self.tokens_per_pass},
        }
        self._state.save(facts, parts, keep)

    @torch.no_grad()
    def resume(self, facts: dict, parts: dict) -> None:
        """Takes up what `save` wrote."""
        for branch in BRANCHES:
            for i, parameter in enumerate(branch_parameters(self.model, branch)):
                parameter.copy_(parts["branches"][f"{branch}.{i:04d}"])
        self.position, self._log_sizes = facts["position"], facts["logs"]
        if facts["training"]:
            self.training = facts["training"], parts
        passes = facts["tokens_per_pass"]
        # Halved when memory ran out: it would run out again.
        if passes["given"] == self.cfg.tokens_per_pass:
            self.tokens_per_pass = passes["used"]


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


def run_identity(cfg, tasks: list[str], about_base: dict, dtype: torch.dtype) -> dict:
    """What must be the same for a run to be resumed: JSON values."""
    config = {
        name: value for name, value in dataclasses.asdict(cfg).items() if name not in NOT_RESULTS
    }
    data = {f"data of {task}": file_sha256(cfg.data_path(task)) for task in tasks}
    return {**config, **about_base, **data, "dtype": str(dtype)}


def _check_identity(folder: Path, saved: dict, now: dict) -> None:
    differing = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if differing:
        listed = ", ".join(
            f"another {name}"
            if "data of" in name
            else f"{name} {saved.get(name)} -> {now.get(name)}"
            for name in differing
        )
        raise UserError(
            f"{folder} holds the state of another run ({listed}): give --overwrite true to start "
            "afresh, or another --save_dir and --log_dir"
        )


def _inject(cfg, model: nn.Module) -> nn.Module:
    try:
        return replace_with_ds_lora(
            model,
            cfg.lora_target_modules,
            cfg.lora_r,
            cfg.lora_alpha,
            cfg.lora_dropout,
            cfg.num_frozen_layers,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


@contextlib.contextmanager
def set_up(cfg, run_name: str, tasks: list[str]):
    """Checks what can be checked, loads model and data, and yields the `Session`.

    Goes on from the saved state of the same run where there is one. Raises `UserError` with all
    problems that show before the model's weights are loaded, and `NothingToDo` after a dry run or
    where the run is finished.
    """
    stop, state = StopSignals(), RunState(state_folder(cfg, run_name))
    with run_lock([cfg.save_dir, cfg.log_dir], run_name), stop.installed():
        _, model_config, *rows = _gather(
            [
                partial(check_outputs, cfg, run_name),
                partial(check_model, cfg),
                *(partial(read_jsonl, cfg.data_path(task)) for task in tasks),
            ]
        )
        device = select_device(cfg.device)
        check_device(cfg, device)
        about_base = describe_base(cfg)
        identity = run_identity(cfg, tasks, about_base, model_dtype(cfg, device))
        saved = None if cfg.overwrite else state.load()
        if saved:
            _check_identity(state.folder, saved[0]["identity"], identity)
            if saved[0]["position"].get("finished"):
                raise NothingToDo(
                    f"this run is finished: see {cfg.log_dir}; --overwrite true does it again"
                )
        tokenizer = load_tokenizer(cfg)
        checks = [
            partial(prepare_task, cfg, tokenizer, *pair) for pair in zip(tasks, rows, strict=True)
        ]
        data = dict(zip(tasks, _gather(checks), strict=True))
        # The branches, without weights: what is wrong with them shows before a model is loaded.
        plan = _inject(cfg, skeleton(model_config))
        check_disk(cfg, plan, len(tasks))
        if cfg.dry_run:
            report_plan(cfg, plan, data, device, saved and saved[0])
            raise NothingToDo("dry run: nothing was trained")
        model = load_model(cfg, device)
        torch.manual_seed(cfg.seed)
        _inject(cfg, model)
        if cfg.gradient_checkpointing:
            enable_checkpointing(model)
        print(f"{device}, {model.dtype}: {describe_parameters(model)}")
        session = Session(cfg, model, tokenizer, device, data, about_base, state, identity, stop)
        if saved:
            session.resume(*saved)
            print(f"going on from {state.folder}")
        else:
            clear_outputs(cfg, run_name)
            session.save()
        with contextlib.closing(session):
            yield session


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


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, frozen) parameters."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters()) - trainable


def describe_parameters(model: nn.Module) -> str:
    """Trainable and frozen parameters, in words."""
    trainable, frozen = count_parameters(model)
    return f"{trainable:,} trainable parameters, {frozen:,} frozen"


def disk_bytes(cfg, model: nn.Module, num_tasks: int) -> int:
    """About what a run writes: checkpoints, and states of branches, AdamW and probes."""
    branches = 4 * count_parameters(model)[0]
    probes = cfg.probe_size_per_task * min(cfg.max_seq_len, 256) * (6 * (cfg.kd_top_k or 1000) + 12)
    tokenizer = 8 * 2**20
    return num_tasks * cfg.num_epochs * (branches + tokenizer) + 3 * (3 * branches + probes)


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
