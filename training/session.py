"""What a run holds while it trains: model, data, logs, saved states, and the wish to stop."""

import contextlib
import dataclasses
import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from configs.base_config import NOT_RESULTS, NothingToDo, Stopped, UserError, num_processes
from models.ds_lora import BRANCHES, branch_parameters, find_decoder_layers, replace_with_ds_lora
from models.frozen_prefix import FrozenPrefix
from training.saving import (
    JsonlLog,
    NoLog,
    RunState,
    check_outputs,
    clear_outputs,
    file_sha256,
    run_lock,
    save_checkpoint,
    state_folder,
)
from utils_data import TaskData, make_passes, prepare_task, read_jsonl
from training.processes import all_succeed, from_first, is_first, joined, rank, shows_progress
from training.base_model import (
    check_device,
    check_model,
    describe_base,
    load_model,
    load_tokenizer,
    model_dtype,
    select_device,
    skeleton,
)
from training.plan import check_disk, describe_parameters, prefix_room, report_plan

# Passes without gradients keep no activations: a GPU takes them larger. A CPU gains nothing.
PASS_WITHOUT_GRADIENTS = 4
PREFIX_TOKENS = 2048


class StopSignals:
    """Turns the first Ctrl-C or SIGTERM into `Stopped` at the next `check()`; a second kills.

    Attributes:
        received: number of the signal that came last, or 0.
    """

    def __init__(self):
        self.received = 0

    def check(self) -> None:
        """Raises `Stopped` where a signal has come."""
        if self.received:
            raise Stopped(self.received)

    def _receive(self, number, _frame) -> None:
        self.received = number
        if num_processes() > 1:
            # torchrun passes on what the terminal has sent already, and kills after 30 seconds.
            return
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

    Args:
        state: where it is saved; None: nowhere.

    Attributes:
        data: task -> its samples.
        position: where the run is, for the script to read and write: JSON values.
        training: what the loop saved of a task that is to be resumed (facts, parts), else None.
        started: when the task at hand was, on `time.perf_counter`; what an earlier process trained
            counts too.
    """

    def __init__(
        self,
        cfg,
        model: nn.Module,
        tokenizer,
        device: torch.device,
        data: dict[str, TaskData],
        about_base: dict,
        state: RunState | None,
        identity: dict,
        stop: StopSignals,
    ):
        self.cfg, self.model, self.tokenizer, self.device = cfg, model, tokenizer, device
        self.data, self.about_base = data, about_base
        self.stop, self.tokens_per_pass = stop, cfg.tokens_per_pass
        self.prefix = FrozenPrefix(model, cfg.num_frozen_layers, prefix_room(cfg))
        self.position: dict = {}
        self.training: tuple[dict, dict] | None = None
        self._state, self.identity = state, identity
        self._attached: dict = {}
        self._resumed_parts: dict[str, dict] = {}
        self._logs: dict[str, JsonlLog] = {}
        self._log_sizes: dict[str, int] = {}
        self.samples_in_pass = 0
        self.started = time.perf_counter()

    def make_passes(self, samples):
        """Cuts this process's share of `samples` into passes, see `utils_data.make_passes`.

        They start from the frozen layers' output where it is kept. Without gradients they are
        larger. Raises `Stopped` between passes where the run is to stop; with several processes
        the loop asks all of them once a step instead.
        """
        for indices, batch, targets in self._passes(samples):
            start = self.prefix.start([samples[i] for i in indices], batch["input_ids"])
            yield indices, {**batch, "start": start} if start else batch, targets

    def frozen_outputs(self, samples):
        """Yields (indices, output of the frozen layers (batch, length, width)) by pass."""
        for indices, batch, _ in self._passes(samples):
            of_pass = [samples[i] for i in indices]
            yield indices, self.prefix.outputs(of_pass, batch["input_ids"])

    def _passes(self, samples):
        tokens = self.tokens_per_pass
        if self.device.type == "cuda" and not torch.is_grad_enabled():
            tokens *= PASS_WITHOUT_GRADIENTS
        for one_pass in self._cut(samples, tokens):
            if num_processes() == 1:
                self.stop.check()
            self.samples_in_pass = len(one_pass[0])
            yield one_pass

    def _cut(self, samples, tokens: int):
        pad, share = self.tokenizer.pad_token_id, (rank(), num_processes())
        return make_passes(samples, tokens, pad, self.device, share)

    def keep_prefix(self, samples, description: str) -> list[str]:
        """Runs the frozen layers over this process's share of `samples` and keeps their output.

        As far as there is room. Returns what `prefix.drop` takes.
        """
        kept = []
        if not self.prefix.room:
            return kept
        progress = tqdm(
            total=len(samples) // num_processes(),
            desc=description,
            unit="sample",
            leave=False,
            disable=not shows_progress(),
        )
        try:
            with progress:
                # Passes of a fixed size: what is kept depends on the samples alone.
                for indices, batch, _ in self._cut(samples, PREFIX_TOKENS):
                    if num_processes() == 1:
                        self.stop.check()
                    kept += self.prefix.keep([samples[i] for i in indices], batch)
                    progress.update(len(indices))
        except (ValueError, torch.OutOfMemoryError) as error:
            reason = str(error).partition("\n")[0]
            print(f"{type(self.model).__name__} goes on without --prefix_cache_gib: {reason}")
            self.prefix.room = 0
        return kept

    @contextlib.contextmanager
    def kept_prefix(self):
        """Yields `keep_prefix`; at the end of the block what it kept is dropped."""
        kept = []
        try:
            yield lambda *args: kept.extend(self.keep_prefix(*args))
        finally:
            self.prefix.drop(kept)

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
            if self.samples_in_pass <= 1:
                raise UserError(
                    "out of GPU memory with one sample a pass: give --gradient_checkpointing true, "
                    "a smaller --max_seq_len, --quantization 4bit, or a larger --num_frozen_layers"
                )
            self.tokens_per_pass = max(1, self.tokens_per_pass // 2)
            print(f"out of GPU memory: going on with --tokens_per_pass {self.tokens_per_pass}")

    def log(self, name: str) -> JsonlLog:
        """Opens `name`.jsonl in the log folder, where a resumed run left it.

        Only the first process writes; the others' lines go nowhere.
        """
        path = Path(self.cfg.log_dir) / f"{name}.jsonl"
        log = JsonlLog if is_first() else NoLog
        self._logs[name] = log(path, self._log_sizes.get(name, 0))
        return self._logs[name]

    def close(self) -> None:
        for log in self._logs.values():
            log.close()

    def save_checkpoint(self, name: str, **tensors: dict[str, torch.Tensor]) -> None:
        """Saves the branches as the PEFT adapter `name` in the checkpoint folder.

        Each of `tensors` goes into a file of its own beside it.
        """
        if is_first():
            path = Path(self.cfg.save_dir) / name
            names = "method", "task_order", "holdout_fraction"
            training = {name: getattr(self.cfg, name) for name in names}
            about = {**self.about_base, **training}
            save_checkpoint(path, self.model, self.tokenizer, about, **tensors)

    def attach(self, name: str, thing):
        """Returns `thing`, whose `state()` is saved with the branches from now on.

        A resumed run gives it to `thing.restore`.
        """
        if name in self._resumed_parts:
            thing.restore(self._resumed_parts.pop(name))
        self._attached[name] = thing
        return thing

    def save(self, training: dict | None = None, parts: dict | None = None) -> None:
        """Saves the branches, the position and, inside a task, what the loop needs to go on."""
        branches = {
            f"{branch}.{i:04d}": parameter.detach().cpu().contiguous()
            for branch in BRANCHES
            for i, parameter in enumerate(branch_parameters(self.model, branch))
        }
        attached = {name: thing.state() for name, thing in self._attached.items()}
        self._save(training, {"branches": branches, **attached, **(parts or {})})

    def finish(self) -> None:
        """Notes that the run is finished."""
        self.position["finished"] = True
        self._save(None, {}, keep=1)

    def _save(self, training, parts, keep: int = 2) -> None:
        if not is_first() or self._state is None:
            return
        facts = {
            "identity": self.identity,
            "position": self.position,
            "training": training,
            "seconds": time.perf_counter() - self.started,
            "logs": {name: log.size() for name, log in self._logs.items()},
            "tokens_per_pass": {"given": self.cfg.tokens_per_pass, "used": self.tokens_per_pass},
            "prefix_room": {"given": self.cfg.prefix_cache_gib, "used": self.prefix.room},
        }
        self._state.save(facts, parts, keep)

    @torch.no_grad()
    def resume(self, facts: dict, parts: dict) -> None:
        """Takes up what `save` wrote."""
        for branch in BRANCHES:
            for i, parameter in enumerate(branch_parameters(self.model, branch)):
                parameter.copy_(parts["branches"][f"{branch}.{i:04d}"])
        self.position, self._log_sizes = facts["position"], facts["logs"]
        self._resumed_parts = parts
        if facts["training"]:
            self.training = facts["training"], parts
            self.started -= facts["seconds"]
        passes = facts["tokens_per_pass"]
        # Halved when memory ran out: it would run out again.
        if passes["given"] == self.cfg.tokens_per_pass:
            self.tokens_per_pass = passes["used"]
        room = facts["prefix_room"]
        # What is kept changes the last bits.
        if room["given"] == self.cfg.prefix_cache_gib and self.prefix.room:
            self.prefix.room = room["used"]


def run_identity(cfg, tasks: list[str], about_base: dict) -> dict:
    """What makes a run the one that it is, whatever machine it is on: JSON values."""
    config = {
        name: value for name, value in dataclasses.asdict(cfg).items() if name not in NOT_RESULTS
    }
    data = {f"data of {task}": file_sha256(cfg.data_path(task)) for task in tasks}
    return {**config, **about_base, **data}


def differences(first: dict, second: dict) -> str:
    """What differs between two identities, in words; "" where nothing does."""
    return ", ".join(
        f"another {name}"
        if "data of" in name
        else f"{name} {first.get(name)} -> {second.get(name)}"
        for name in {**first, **second}
        if first.get(name) != second.get(name)
    )


def _check_identity(folder: Path, saved: dict | None, first: dict, own: dict) -> None:
    """Compares this process with the first one, and that with the saved state."""
    if differing := differences(first, own):
        raise UserError(
            f"process {rank()} is not like the first one ({differing}): give each machine the same "
            "files and packages"
        )
    if saved and (differing := differences(saved, own)):
        raise UserError(
            f"{folder} holds the state of another run ({differing}): give --overwrite true to "
            "start afresh, or another --save_dir and --log_dir"
        )


def inject(cfg, model: nn.Module) -> nn.Module:
    """`model` with the branches that `cfg` asks for; `UserError` where they do not fit."""
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
    with contextlib.ExitStack() as stack:
        stack.enter_context(joined())
        lock = run_lock([cfg.save_dir, cfg.log_dir], run_name)
        all_succeed([partial(stack.enter_context, lock)] if is_first() else [])
        stack.enter_context(stop.installed())
        model_config, device, _, *rows = all_succeed(
            [
                partial(check_model, cfg),
                partial(select_device, cfg.device),
                *([partial(check_outputs, cfg, run_name)] if is_first() else [lambda: None]),
                *(partial(read_jsonl, cfg.data_path(task)) for task in tasks),
            ]
        )
        all_succeed([partial(check_device, cfg, device)])
        about_base = describe_base(cfg)
        # To be resumed it must also be held and shared alike.
        held = {"held_as": str(model_dtype(cfg, device)), "processes": num_processes()}
        identity = run_identity(cfg, tasks, about_base) | held
        (saved,) = all_succeed([state.load if is_first() and not cfg.overwrite else lambda: None])
        saved, first = from_first((saved, identity))
        known = saved and saved[0]["identity"]
        all_succeed([partial(_check_identity, state.folder, known, first, identity)])
        if saved and saved[0]["position"].get("finished"):
            raise NothingToDo(
                f"this run is finished: see {cfg.log_dir}; --overwrite true does it again"
            )
        tokenizer = load_tokenizer(cfg)
        checks = [
            partial(prepare_task, cfg, tokenizer, *pair) for pair in zip(tasks, rows, strict=True)
        ]
        data = dict(zip(tasks, all_succeed(checks), strict=True))
        # The branches, without weights: what is wrong with them shows before a model is loaded.
        (plan,) = all_succeed([lambda: inject(cfg, skeleton(model_config))])
        all_succeed([partial(check_disk, cfg, plan, len(tasks))] if is_first() else [])
        if cfg.dry_run:
            report_plan(cfg, plan, data, device, saved and saved[0])
            raise NothingToDo("dry run: nothing was trained")
        (model,) = all_succeed([partial(load_model, cfg, device)])
        torch.manual_seed(cfg.seed)
        inject(cfg, model)
        if cfg.gradient_checkpointing:
            enable_checkpointing(model)
        print(f"{device}, {model.dtype}: {describe_parameters(model)}")
        session = Session(cfg, model, tokenizer, device, data, about_base, state, identity, stop)
        if saved:
            session.resume(*saved)
            print(f"going on from {state.folder}")
        elif is_first():
            clear_outputs(cfg, run_name)
            session.save()
        for task, samples in data.items():
            session.keep_prefix(samples.held_out, f"frozen layers, {task} held out")
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
