"""The readings of a trained model: which branches answer a sample, and what their loss is."""

import contextlib
import dataclasses
import os
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import Subset

from configs.command_line import UserError, is_first
from configs.task_files import judges_of, paths_with_those_of_then
from methods import METHODS, find_method
from methods.method import JOINT, Method
from models.adapter import load_adapter
from models.answers import everywhere
from models.ds_lora import BRANCHES, branch_off, branches_restored
from models.forward import evaluation, response_tokens
from models.reading import read_json, read_safetensors
from models.router import Router, prompt_feature
from tasks.prompt import PromptTemplate
from training.base_model import (
    check_model,
    load_model,
    load_tokenizer,
)
from training.device import select_device
from training.identity import base_identity, describe_base, differences
from training.journal import DECIDED_IN_TRAINING
from training.loop import check_finite, evaluate_loss
from training.passes import Passes, StopSignals
from training.processes import gather
from training.session import inject
from utils_data import TaskData

ROUTER_PROMPTS = 500


@dataclass
class Reading:
    """What is done to the model as it is.

    Attributes:
        meaning: in words.
        own: branches that come from the stage checkpoint of a task: that of the sample's own task,
            or the one that the router takes it for.
        off: branches that add nothing.
    """

    meaning: str
    own: tuple[str, ...] = ()
    off: tuple[str, ...] = ()
    is_routed: bool = False


# "latest" minus "own" bounds from above what is access, not knowledge; "fast" and "stage" are
# controls.
BASE, LATEST = "base", "latest"
READINGS = {
    LATEST: Reading("slow + fast"),
    "own": Reading("slow + own fast", own=("fast",)),
    "slow": Reading("slow alone", off=("fast",)),
    "fast": Reading("own fast alone", own=("fast",), off=("slow",)),
    "stage": Reading("own slow + fast", own=BRANCHES),
    "routed": Reading("slow + fast of the task that the prompt seems to be", ("fast",), (), True),
}


def possible_readings(method: type[Method], passes: Passes) -> list[str]:
    """The readings that mean something for a model trained by `method`."""
    # Without a frozen layer no hidden state stays as it was.
    return [
        name for name in method.readings if not READINGS[name].is_routed or passes.has_frozen_output
    ]


@dataclass
class Stage:
    """A trained model, or the untouched base, to be read.

    Attributes:
        name: the task just learned, JOINT, or BASE.
        data: task -> samples, of those that were read.
        router: of the tasks seen so far; it has none where no routing was learned.
        about_base: what `describe_base` says of the model's base, for checkpoints to be compared.
    """

    name: str
    cfg: object
    passes: Passes
    data: dict[str, TaskData] = field(default_factory=dict)
    router: Router = field(default_factory=Router)
    about_base: dict = field(default_factory=dict)

    @property
    def method(self) -> type[Method]:
        """What trained it."""
        return find_method(self.cfg.method)

    @property
    def readings(self) -> list[str]:
        """Those that mean something for it."""
        if self.name == BASE:
            return [LATEST]
        return possible_readings(self.method, self.passes)

    @property
    def seen(self) -> list[str]:
        """The tasks learned so far, in their order."""
        order = self.cfg.task_order
        if self.name == JOINT:
            return order
        return order[: order.index(self.name) + 1] if self.name in order else []

    def folder_of(self, task: str) -> Path:
        """The checkpoint that `task` left when it was learned."""
        return Path(self.cfg.save_dir) / f"seq_{task}"

    def take_up(self, folder: Path) -> None:
        """Takes up the branches and the router of a checkpoint on the same base model.

        What its training decided goes into the configuration: method, tasks and their order, and
        held-out share; where both name a task's files, the configuration's count if they were
        given. Raises `UserError`, and stays what it was, where it does not fit.
        """
        try:
            facts, _ = read_facts(folder)
        except ValueError as error:
            raise UserError(f"{folder} is no stage checkpoint ({error})") from error
        doubt = check_same_base(f"{folder}", facts, self.about_base)
        known = {name: facts[name] for name in DECIDED_IN_TRAINING if name in facts}
        try:
            paths = paths_with_those_of_then(self.cfg, facts.get("data_paths") or {})
            known |= {"data_paths": paths, "save_dir": str(folder.parent)}
            if self.cfg.task_judges:
                # Those given now, not those of then.
                known["task_judges"] = self.cfg.task_judges
            elif "task_judges" in known:
                # Older checkpoints have those of tasks whose files they do not name.
                known["task_judges"] = judges_of(known["task_judges"], paths)
            cfg = dataclasses.replace(self.cfg, **known)
        except (UserError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / 'ds_lora.json'}: {error}") from error
        # A file is run by who names it, not by who made the checkpoint.
        if cfg.method not in (*METHODS, self.cfg.method):
            raise UserError(f"{folder} was trained by --method {cfg.method!r}: give the same here")
        template = PromptTemplate(self.passes.tokenizer, cfg.prompt_template)
        then = dataclasses.replace(
            self, name=folder.name.removeprefix("seq_"), cfg=cfg, router=Router()
        )
        then.read_router(folder / "router.safetensors")
        try:
            load_adapter(self.passes.model, folder)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.name, self.cfg, self.router = then.name, then.cfg, then.router
        self.passes.template = template
        if doubt and is_first():
            print(doubt, file=sys.stderr)

    def read_router(self, path: Path) -> None:
        """Takes up the router of a stage, where there is one; `UserError` where it does not fit."""
        if not os.path.lexists(path):
            return
        width = self.passes.model.config.get_text_config().hidden_size
        tasks = self.cfg.task_order
        try:
            # Two square matrices at most, and a kilobyte for a name.
            most = 2 * width * (width + len(tasks)) + 1000 * len(tasks)
            self.router.restore(read_safetensors(path, most), width)
            found = self.router.tasks
            if found != self.seen and (self.seen or not set(found) <= set(tasks)):
                wanted = ", ".join(self.seen or tasks)
                raise ValueError(f"it knows the tasks {', '.join(found)}, not {wanted}")
        except ValueError as error:
            fault = f"its router does not fit ({error}): put the stage's own back"
            raise UserError(f"{path.parent}: {fault}") from error


@contextlib.contextmanager
def read_as(stage: Stage, reading: str, source: str):
    """Within the block the model is what `reading` makes of it, with own branches of `source`.

    They come from `seq_<source>` in the checkpoint folder. Raises `UserError` where that does not
    fit.
    """
    own, off, model = READINGS[reading].own, READINGS[reading].off, stage.passes.model
    if stage.method.is_one_lora:
        own = BRANCHES if own else ()
    with contextlib.ExitStack() as stack:
        if own:
            stack.enter_context(branches_restored(model))
            try:
                load_adapter(model, stage.folder_of(source), own)
            except ValueError as error:
                raise UserError(f"--branches {reading}: {error}") from error
        for branch in off:
            stack.enter_context(branch_off(model, branch))
        yield


def prompt_features(passes: Passes, samples) -> torch.Tensor:
    """What `Router` knows of the prompts of `samples`: (n, width) fp32, on the CPU."""

    def run() -> dict[int, torch.Tensor]:
        features = {}
        with evaluation(passes.model):
            for indices, hidden in passes.frozen_outputs(samples):
                for row, i in zip(hidden, indices, strict=True):
                    prompt_length = len(samples[i]["labels"]) - response_tokens(samples[i])
                    features[i] = prompt_feature(row, prompt_length).cpu()
        return features

    features = everywhere(gather, passes.with_less_memory(run))
    return torch.stack([features[i] for i in range(len(samples))])


def add_to_router(stage: Stage) -> None:
    """Adds the task just learned, from some of its training prompts."""
    samples = stage.data[stage.name].train
    size = min(ROUTER_PROMPTS, len(samples))
    order = random.Random(f"{stage.cfg.seed}/{stage.name}/router")
    chosen = order.sample(range(len(samples)), size)
    stage.router.add(stage.name, prompt_features(stage.passes, Subset(samples, chosen)))


def sources_of(stage: Stage, reading: str, task: str, samples) -> dict[str, list[int]]:
    """Task -> indices of the `samples` of `task` that are answered with its own branches."""
    if not READINGS[reading].is_routed:
        return {task: list(range(len(samples)))}
    sources: dict[str, list[int]] = {}
    for i, source in enumerate(stage.router.route(prompt_features(stage.passes, samples))):
        sources.setdefault(source, []).append(i)
    return sources


def evaluate_reading(
    stage: Stage, reading: str, task: str, known: dict[tuple, float]
) -> tuple[dict, dict[str, int]]:
    """({"loss": nats per response token, "tokens"}, task -> samples answered as that task).

    Over the held-out samples of `task`.

    Args:
        known: token ids of a sample -> its loss, where it was read already.

    Raises:
        UserError: a loss is not finite.
    """
    samples, parts, unread = stage.data[task].held_out, [], set()
    for i, sample in enumerate(samples):
        loss = known.get((*sample["input_ids"].tolist(),))
        if loss is None:
            unread.add(i)
        else:
            parts.append({"loss": loss, "tokens": response_tokens(sample)})
    sources = sources_of(stage, reading, task, samples)
    description = f"{stage.name}: {task} ({reading})"
    for source, chosen in sources.items():
        if of_source := [i for i in chosen if i in unread]:
            with read_as(stage, reading, source):
                parts.append(evaluate_loss(stage.passes, Subset(samples, of_source), description))
    tokens = sum(part["tokens"] for part in parts)
    loss = sum(part["loss"] * part["tokens"] for part in parts) / tokens
    check_finite(loss, description)
    return (
        {"loss": loss, "tokens": tokens},
        {source: len(chosen) for source, chosen in sources.items()},
    )


def _frozen_layers(facts: dict, peft: dict) -> int:
    # Where only some layers have a target, the lowest with branches may be far above the frozen
    # ones. Older checkpoints do not say more.
    if "num_frozen_layers" in facts:
        return facts["num_frozen_layers"]
    return min(peft["layers_to_transform"])


def read_facts(folder: Path) -> tuple[dict, dict]:
    """What ds_lora.json and adapter_config.json of a checkpoint say; ValueError without them."""
    facts = tuple(read_json(folder / name) for name in ("ds_lora.json", "adapter_config.json"))
    if not all(isinstance(of_file, dict) for of_file in facts):
        raise ValueError("ds_lora.json or adapter_config.json is no JSON object")
    return facts


def check_same_base(name: str, facts: dict, about_base: dict) -> str:
    """Raises `UserError` where the checkpoint `name`, of the `facts`, has another base.

    Returns a warning where that cannot be told and the names of the two differ, else "".
    """
    about = base_identity(about_base)
    known = {key: facts[key] for key in about if key in facts}
    if differing := differences(known, {key: about[key] for key in known}):
        raise UserError(f"{name} has another base model ({differing}): give its own")
    then, now = facts.get("base_model"), about_base.get("base_model")
    # A folder has hashes and a hub id has none; a copy of the model goes by its name.
    if not now or known.keys() - {"quantization"} or Path(str(then)).name == Path(now).name:
        return ""
    return f"warning: {name} was trained on {then}, and whether {now} is the same cannot be told"


def open_stage(cfg, checkpoint: str) -> Stage:
    """Loads the base model and the stage checkpoint `checkpoint`, a folder, or "base" for none.

    Rank, scale and places of the branches are the checkpoint's, whatever `cfg` says. Raises
    `UserError` where the folder is no such checkpoint or was trained on another base model.
    """
    folder, facts = Path(checkpoint), {}
    if folder.name in ("", ".."):
        # The folder's name is the stage's.
        folder = folder.resolve()
    if checkpoint != BASE:
        try:
            facts, peft = read_facts(folder)
            cfg = dataclasses.replace(
                cfg,
                lora_r=facts["r"],
                lora_alpha=facts["alpha"],
                use_rslora=facts.get("use_rslora", False),
                lora_target_modules=facts.get("lora_target_modules", peft["target_modules"]),
                num_frozen_layers=_frozen_layers(facts, peft),
            )
        except (UserError, ValueError, KeyError, TypeError) as error:
            fault = repr(error) if isinstance(error, KeyError | TypeError) else str(error)
            raise UserError(
                f"--checkpoint {folder} is no stage checkpoint ({'; '.join(fault.splitlines())}): "
                f"give a folder such as checkpoints/seq_{cfg.task_order[-1]}, or base"
            ) from error
    model_config = check_model(cfg)
    about_base = describe_base(cfg)
    check_same_base(f"--checkpoint {folder}", facts, about_base)
    device = select_device(cfg.device)
    model = inject(cfg, load_model(cfg, device))
    passes = Passes(cfg, model, load_tokenizer(cfg, model_config), device, StopSignals())
    stage = Stage(BASE, cfg, passes, about_base=about_base)
    if checkpoint != BASE:
        stage.take_up(folder)
    return stage
