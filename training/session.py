"""What a script trains with, and the journal of a run: its logs, position, states, checkpoints."""

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from configs.command_line import NothingToDo, UserError, is_first, num_processes
from models.adapter import save_adapter
from models.ds_lora import (
    branch_tensors,
    find_decoder_layers,
    replace_with_ds_lora,
    set_branch_tensors,
)
from tasks import TASKS, judged_task
from tasks.judges import describe
from tasks.prompt import PromptTemplate
from training.base_model import (
    check_device,
    check_model,
    load_model,
    load_tokenizer,
    skeleton,
)
from training.device import model_dtype, select_device
from training.identity import check_identity, describe_base, run_identity
from training.logs import JsonlLog, NoLog
from training.outputs import (
    check_finished,
    check_outputs,
    clear_outputs,
    state_folder,
    write_settings,
)
from training.passes import Passes, StopSignals
from training.plan import (
    check_disk,
    describe_parameters,
    disk_bytes,
    prefix_limits,
    report_plan,
)
from training.prefix_store import open_store
from training.processes import all_succeed, from_first, joined
from training.saving import RunState, atomic_file, atomic_folder, run_lock
from training.trackers import Trackers, check_trackers
from utils_data import TaskData, prepare_task, read_task

CARD = "README.md"
# What a checkpoint says of the run that made it, and what reads it must do alike.
DECIDED_IN_TRAINING = (
    "method",
    "task_order",
    "task_judges",
    "holdout_fraction",
    "prompt_template",
    "num_frozen_layers",
    "lora_target_modules",
)


class Journal:
    """What a run writes, and takes up again when it is resumed.

    Args:
        passes: of the model whose branches are saved.
        about_base: what its checkpoints say of their base.
        state: where its states are.
        identity: what makes it the run that it is.
        check_lock: raises `UserError` where its folders are no longer held.

    Attributes:
        position: where the run is, for the script to read and write: JSON values.
        training: what the loop saved of a task that is to be resumed (facts, parts), else None.
        trackers: where the lines of its logs are shown too.
        started: when the task at hand was, on `time.perf_counter`; what an earlier process trained
            counts too.
    """

    def __init__(
        self,
        cfg,
        passes: Passes,
        about_base: dict,
        state: RunState,
        identity: dict,
        check_lock: Callable[[], None] = lambda: None,
    ):
        self.cfg, self.passes, self.about_base = cfg, passes, about_base
        self.position: dict = {}
        self.training: tuple[dict, dict] | None = None
        self.started = time.perf_counter()
        self._state, self.identity, self._check_lock = state, identity, check_lock
        self.trackers = Trackers()
        self._attached: dict = {}
        self._resumed_parts: dict[str, dict] = {}
        self._logs: dict[str, JsonlLog] = {}
        self._logs_written: dict[str, dict] = {}

    def log(self, name: str) -> JsonlLog:
        """Opens `name`.jsonl in the log folder, where a resumed run left it.

        Only the first process writes; the others' lines go nowhere.
        """
        path = Path(self.cfg.log_dir) / f"{name}.jsonl"
        log = JsonlLog if is_first() else NoLog
        also = partial(self.trackers.write, name)
        self._logs[name] = log(path, self._logs_written.get(name), also)
        return self._logs[name]

    def picture(self, draw: Callable[[], Path]) -> None:
        """Hands a picture to the trackers; without one nothing is drawn."""
        if self.trackers:
            self.trackers.picture(draw())

    def close(self) -> None:
        for log in self._logs.values():
            log.close()
        self.trackers.finish()

    def save_checkpoint(self, name: str, card: str = "", **tensors: dict) -> None:
        """Saves the branches as the PEFT adapter `name`, one atomic folder in `save_dir`.

        With the tokenizer, and `card` as its README.md where there is one; each of `tensors` goes
        into a safetensors file of its own beside it.
        """
        if not is_first():
            return
        decided = {name: getattr(self.cfg, name) for name in DECIDED_IN_TRAINING}
        decided["data_paths"] = {task: self.cfg.data_paths[task] for task in self.cfg.task_order}
        with atomic_folder(Path(self.cfg.save_dir) / name) as folder:
            save_adapter(self.passes.model, folder, **self.about_base, **decided)
            with prompts_as_trained(self.passes.template):
                self.passes.tokenizer.save_pretrained(folder)
            for file_name, of_file in tensors.items():
                blob = safetensors.torch.save(of_file, metadata={"format": "pt"})
                (folder / f"{file_name}.safetensors").write_bytes(blob)
            if card:
                (folder / CARD).write_text(card, encoding="utf-8")

    def renew_card(self, name: str, card: str) -> None:
        """Replaces the card of the checkpoint `name`, when more is known of it."""
        if is_first():
            with atomic_file(Path(self.cfg.save_dir) / name / CARD) as file:
                file.write(card)

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
        branches = branch_tensors(self.passes.model)
        attached = {name: thing.state() for name, thing in self._attached.items()}
        self._save(training, {"branches": branches, **attached, **(parts or {})})

    def finish(self) -> None:
        """Notes that the run is finished."""
        self.position["finished"] = True
        self._save(None, {}, keep=1)

    def _save(self, training, parts, keep: int = 2) -> None:
        if not is_first():
            return
        self._check_lock()
        facts = {
            "identity": self.identity,
            "position": self.position,
            "training": training,
            "seconds": time.perf_counter() - self.started,
            "logs": {name: log.written() for name, log in self._logs.items()},
            "tokens_per_pass": {
                "given": self.cfg.tokens_per_pass,
                "used": self.passes.tokens_per_pass,
                "divisor": self.passes.divisor,
            },
            "samples_read": self.passes.samples_read,
            "trackers": self.trackers.state,
            "prefix_room": {"given": prefix_limits(self.cfg), "used": self.passes.prefix.room},
        }
        self._state.save(facts, parts, keep)

    def resume(self, facts: dict, parts: dict) -> None:
        """Takes up what `save` wrote."""
        set_branch_tensors(self.passes.model, parts["branches"])
        self.position, self._logs_written = facts["position"], facts["logs"]
        self.trackers = Trackers(facts.get("trackers"))
        self._resumed_parts = parts
        if facts["training"]:
            self.training = facts["training"], parts
            self.started -= facts["seconds"]
        self.passes.samples_read = facts["samples_read"]
        passes = facts["tokens_per_pass"]
        # Halved when memory ran out: it would run out again.
        if passes["given"] == self.cfg.tokens_per_pass:
            self.passes.tokens_per_pass, self.passes.divisor = passes["used"], passes["divisor"]
        room = facts["prefix_room"]
        # What is kept changes the last bits.
        prefix = self.passes.prefix
        if room["given"] == prefix_limits(self.cfg) and prefix.room:
            prefix.room = room["used"]


@contextlib.contextmanager
def prompts_as_trained(template: PromptTemplate):
    """Within the block the tokenizer's chat template is `template`: servers prompt with it."""
    tokenizer = template.tokenizer
    own, tokenizer.chat_template = tokenizer.chat_template, template.chat_template()
    try:
        yield
    finally:
        tokenizer.chat_template = own


@dataclass
class Session:
    """What a script trains with: task -> its samples, how they reach the model, what is written."""

    data: dict[str, TaskData]
    passes: Passes
    journal: Journal


def inject(cfg, model: nn.Module) -> nn.Module:
    """`model` with the branches that `cfg` asks for, and with its checkpointing.

    Raises `UserError` where they do not fit.
    """
    try:
        replace_with_ds_lora(
            model,
            cfg.lora_target_modules,
            cfg.lora_r,
            cfg.lora_alpha,
            cfg.lora_dropout,
            cfg.num_frozen_layers,
            cfg.use_rslora,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    if cfg.gradient_checkpointing:
        enable_checkpointing(model)
    return model


def _prepared(cfg, tokenizer, rows: dict[str, tuple]) -> dict[str, TaskData]:
    """The samples of each task, from what `read_task` gave; says what the user may want to know."""
    all_succeed([partial(PromptTemplate, tokenizer, cfg.prompt_template)])
    if is_first() and cfg.prompt_template == "inst" and tokenizer.chat_template:
        print(
            "note: the tokenizer has a chat template, and --prompt_template inst does not use "
            "it; chat does",
            file=sys.stderr,
        )
    checks = [partial(prepare_task, cfg, tokenizer, task, *of) for task, of in rows.items()]
    data = dict(zip(rows, all_succeed(checks), strict=True))
    for task in (task for task in rows if task not in TASKS or cfg.judge_of(task)):
        print(describe(judged_task(task, cfg.judge_of(task), data[task].outputs)))
    return data


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
        check_lock = all_succeed([partial(stack.enter_context, lock)] if is_first() else [])
        stack.enter_context(stop.installed())
        model_config, device, _, _, *rows = all_succeed(
            [
                partial(check_model, cfg),
                partial(select_device, cfg.device),
                partial(check_trackers, cfg),
                *([partial(check_outputs, cfg, run_name)] if is_first() else [lambda: None]),
                *(partial(read_task, cfg, task) for task in tasks),
            ]
        )
        all_succeed([partial(check_device, cfg, device)])
        about_base = describe_base(cfg)
        # To be resumed it must also be held and shared alike.
        held_as = str(model_dtype(cfg, device)).removeprefix("torch.")
        held = {"dtype": held_as, "processes": num_processes()}
        identity = run_identity(cfg, tasks, about_base) | held
        (saved,) = all_succeed([state.load if is_first() and not cfg.overwrite else lambda: None])
        saved, first = from_first((saved, identity))
        known = saved and saved[0]["identity"]
        all_succeed([partial(check_identity, state.folder, known, first, identity)])
        if saved and saved[0]["position"].get("finished"):
            all_succeed([partial(check_finished, cfg, run_name, saved[0])] if is_first() else [])
            raise NothingToDo(
                f"this run is finished: see {cfg.log_dir}; --overwrite true does it again"
            )
        tokenizer = load_tokenizer(cfg, model_config)
        data = _prepared(cfg, tokenizer, dict(zip(tasks, rows, strict=True)))
        # The branches, without weights: what is wrong with them shows before a model is loaded.
        (plan,) = all_succeed([lambda: inject(cfg, skeleton(cfg, model_config))])
        # A sequence leaves a checkpoint a task, a task alone one an epoch.
        checkpoints = len(tasks) if run_name == "seq" else cfg.num_epochs
        disk = disk_bytes(cfg, plan, data, checkpoints)
        all_succeed([partial(check_disk, cfg, disk)] if is_first() else [])
        if cfg.dry_run:
            report_plan(cfg, plan, data, device, disk, saved and saved[0])
            raise NothingToDo("dry run: nothing was trained")
        (model,) = all_succeed([partial(load_model, cfg, device)])
        torch.manual_seed(cfg.seed)
        inject(cfg, model)
        print(f"{device}, {model.dtype}: {describe_parameters(model)}")
        (store,) = all_succeed([partial(open_store, cfg, model, about_base)])
        passes = Passes(cfg, model, tokenizer, device, stop, store)
        journal = Journal(cfg, passes, about_base, state, identity, *check_lock)
        if saved:
            journal.resume(*saved)
            print(f"going on from {state.folder}")
        elif is_first():
            clear_outputs(cfg, run_name)
            journal.save()
        if is_first():
            write_settings(cfg, run_name, tasks)
        with contextlib.closing(journal):
            if is_first():
                journal.trackers.start(cfg, run_name, is_new=not saved)
            for task, samples in data.items():
                passes.keep_prefix(samples.held_out, f"frozen layers, {task} held out")
            yield Session(data, passes, journal)


def enable_checkpointing(model: nn.Module) -> None:
    """Recomputes the layers with branches in the backward; the frozen bottom stays outside it.

    Raises `UserError` where the family cannot.
    """
    # The reentrant kind gives `backward(inputs=...)` nothing, without a word.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"--gradient_checkpointing true: {error} Give false") from error
    # transformers 5 makes the embeddings require grad, which would drag the backward through the
    # frozen layers.
    model.disable_input_require_grads()
    for layer in find_decoder_layers(model)[1]:
        if not any(p.requires_grad for p in layer.parameters()):
            layer.gradient_checkpointing = False
