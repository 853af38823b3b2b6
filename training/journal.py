"""The journal of a run: its logs, position, states and checkpoints."""

import contextlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import safetensors.torch

from configs.command_line import is_first
from configs.task_files import judges_of
from models.adapter import save_adapter
from models.ds_lora import branch_tensors, set_branch_tensors
from tasks.prompt import PromptTemplate
from training.logs import JsonlLog, NoLog
from training.passes import Passes
from training.plan import prefix_limits
from training.saving import RunState, atomic_file, atomic_folder
from training.trackers import Trackers

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
        decided["task_judges"] = judges_of(self.cfg.task_judges, self.cfg.task_order)
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
        folder = Path(self.cfg.save_dir) / name
        # It may have been taken away.
        if is_first() and folder.is_dir():
            with atomic_file(folder / CARD) as file:
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
        # Whoever has not attached by now is not saved either: the copies may go.
        self._resumed_parts = {}
        branches = branch_tensors(self.passes.model)
        attached = {name: thing.state() for name, thing in self._attached.items()}
        self._save(training, {"branches": branches, **attached, **(parts or {})})

    def finish(self) -> None:
        """Notes that the run is finished."""
        self.position["finished"] = True
        self._save(None, {}, keep=1)

    def _save(self, training, parts, keep: int = 2) -> None:
        samples_read = self.passes.samples_read_by_all()
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
            "samples_read": samples_read,
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
        if is_first():
            # Those of all processes, which only their sum counts.
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
