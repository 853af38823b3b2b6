"""What a script trains with, and the start of a run: what is checked, loaded and taken up."""

import contextlib
import sys
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from configs.command_line import NothingToDo, UserError, is_first, num_processes
from models.ds_lora import find_decoder_layers, replace_with_ds_lora
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
from training.hub import check_hub, check_new
from training.identity import check_identity, describe_base, run_identity
from training.journal import Journal
from training.outputs import (
    check_finished,
    check_outputs,
    clear_outputs,
    own_names,
    state_folder,
    write_settings,
)
from training.passes import Passes, StopSignals
from training.plan import (
    check_disk,
    count_checkpoints,
    describe_parameters,
    disk_bytes,
    report_plan,
)
from training.prefix_store import open_store
from training.processes import all_succeed, from_first, joined
from training.saving import RunState, run_lock
from training.trackers import check_trackers
from utils_data import TaskData, prepare_task, read_task


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


def _checked(cfg, run_name: str, tasks: list[str], state: RunState) -> tuple:
    """(model's configuration, device, rows by task, about the base, identity, saved state).

    The saved state is (facts, parts), or None. Raises `UserError` with all that is wrong, and
    `NothingToDo` where the run is finished.
    """
    model_config, device, _, _, _, *rows = all_succeed(
        [
            partial(check_model, cfg),
            partial(select_device, cfg.device),
            partial(check_trackers, cfg),
            partial(check_hub, cfg),
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
        later = "; `hf upload` uploads what is there" if cfg.push_to_hub else ""
        raise NothingToDo(
            f"this run is finished: see {cfg.log_dir}; --overwrite true does it again{later}"
        )
    all_succeed([partial(check_new, cfg)] if not saved else [])
    return model_config, device, dict(zip(tasks, rows, strict=True)), about_base, identity, saved


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
        lock = run_lock([cfg.save_dir, cfg.log_dir], run_name, own_names(cfg, run_name))
        check_lock = all_succeed([partial(stack.enter_context, lock)] if is_first() else [])
        stack.enter_context(stop.installed())
        model_config, device, rows, about_base, identity, saved = _checked(
            cfg, run_name, tasks, state
        )
        tokenizer = load_tokenizer(cfg, model_config)
        data = _prepared(cfg, tokenizer, rows)
        # The branches, without weights: what is wrong with them shows before a model is loaded.
        (plan,) = all_succeed([lambda: inject(cfg, skeleton(cfg, model_config))])
        disk = disk_bytes(cfg, plan, data, count_checkpoints(cfg, run_name, data))
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
        else:
            if is_first():
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
