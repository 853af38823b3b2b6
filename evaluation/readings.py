"""The readings of a trained model: which branches answer a sample, and what their loss is."""

import contextlib
import dataclasses
import json
import random
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch.utils.data import Subset

from configs.base_config import UserError
from models.ds_lora import BRANCHES, branch_off, branches_restored, load_adapter
from models.forward import evaluation
from models.router import Router, prompt_feature
from models.answers import everywhere
from training.processes import gather
from training.base_model import check_model, describe_base, load_model, load_tokenizer, select_device
from training.session import Session, StopSignals, differences, inject
from training.loop import evaluate_loss

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


def readings_of(method: str, num_frozen_layers: int) -> list[str]:
    """The readings that mean something for a model trained by `method`."""
    found = {"ds_lora": list(READINGS), "bank": [LATEST, "own", "routed"]}
    # Without a frozen layer no hidden state stays as it was.
    return [
        name
        for name in found.get(method, [LATEST])
        if num_frozen_layers or not READINGS[name].is_routed
    ]


@contextlib.contextmanager
def read_as(session, method: str, reading: str, source: str):
    """Within the block the model is what `reading` makes of it, with own branches of `source`.

    They come from `seq_<source>` in the checkpoint folder. Raises `UserError` where that does not
    fit.
    """
    own, off = READINGS[reading].own, READINGS[reading].off
    if method == "bank":
        # Its two branches are one LoRA.
        own = BRANCHES if own else ()
    with contextlib.ExitStack() as stack:
        if own:
            stack.enter_context(branches_restored(session.model))
            try:
                load_adapter(session.model, Path(session.cfg.save_dir) / f"seq_{source}", own)
            except ValueError as error:
                raise UserError(f"--branches {reading}: {error}") from error
        for branch in off:
            stack.enter_context(branch_off(session.model, branch))
        yield


def prompt_features(session, samples) -> torch.Tensor:
    """What `Router` knows of the prompts of `samples`: (n, width) fp32, on the CPU."""

    def run() -> dict[int, torch.Tensor]:
        features = {}
        with evaluation(session.model):
            for indices, hidden in session.frozen_outputs(samples):
                for row, i in zip(hidden, indices, strict=True):
                    prompt_length = int((samples[i]["labels"] == -100).sum())
                    features[i] = prompt_feature(row, prompt_length).cpu()
        return features

    features = everywhere(gather, session.with_less_memory(run))
    return torch.stack([features[i] for i in range(len(samples))])


def add_to_router(session, router: Router, task: str) -> None:
    """Adds `task` from some of its training prompts."""
    samples = session.data[task].train
    size = min(ROUTER_PROMPTS, len(samples))
    chosen = random.Random(f"{session.cfg.seed}/{task}/router").sample(range(len(samples)), size)
    router.add(task, prompt_features(session, Subset(samples, chosen)))


def sources_of(session, reading: str, task: str, samples, router: Router) -> dict[str, list[int]]:
    """Task -> indices of the `samples` of `task` that are answered with its own branches."""
    if not READINGS[reading].is_routed:
        return {task: list(range(len(samples)))}
    sources: dict[str, list[int]] = {}
    for i, source in enumerate(router.route(prompt_features(session, samples))):
        sources.setdefault(source, []).append(i)
    return sources


@dataclass
class Stage:
    """A trained model, or the untouched base, opened to be read.

    Attributes:
        name: the task just learned, "joint", or "base".
        method: what trained it.
        router: of the tasks seen so far; it has none where no routing was learned.
    """

    name: str
    method: str
    session: Session
    router: Router

    @property
    def seen(self) -> list[str]:
        """The tasks learned so far, in their order."""
        order = self.session.cfg.task_order
        if self.name == "joint":
            return order
        return order[: order.index(self.name) + 1] if self.name in order else []

    def take_up(self, folder: Path) -> None:
        """Takes up the branches and the router of a checkpoint on the same base model.

        What its training decided goes into the session's configuration: method, order of the tasks
        and held-out share. Raises `UserError` where it does not fit.
        """
        try:
            load_adapter(self.session.model, folder)
            facts = json.loads((folder / "ds_lora.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(str(error)) from error
        names = "method", "task_order", "holdout_fraction"
        known = {name: facts[name] for name in names if name in facts}
        self.session.cfg = dataclasses.replace(self.session.cfg, **known)
        self.session.cfg.save_dir = str(folder.parent)
        self.method = self.session.cfg.method
        self.name, self.router = folder.name.removeprefix("seq_"), Router()
        saved = folder / "router.safetensors"
        if saved.exists():
            self.router.restore(safetensors.torch.load(saved.read_bytes()))


def evaluate_reading(stage: Stage, reading: str, task: str) -> tuple[dict, dict[str, int]]:
    """({"loss": nats per response token, "tokens"}, task -> samples answered as that task).

    Over the held-out samples of `task`.
    """
    session, parts = stage.session, []
    samples = session.data[task].held_out
    sources = sources_of(session, reading, task, samples, stage.router)
    for source, chosen in sources.items():
        with read_as(session, stage.method, reading, source):
            description = f"{stage.name}: {task} ({reading})"
            parts.append(evaluate_loss(session, Subset(samples, chosen), description))
    tokens = sum(part["tokens"] for part in parts)
    loss = sum(part["loss"] * part["tokens"] for part in parts) / tokens
    return (
        {"loss": loss, "tokens": tokens},
        {source: len(chosen) for source, chosen in sources.items()},
    )


def open_stage(cfg, checkpoint: str) -> Stage:
    """Loads the base model and the stage checkpoint `checkpoint`, a folder, or "base" for none.

    Rank, scale and places of the branches are the checkpoint's, whatever `cfg` says. Raises
    `UserError` where the folder is no such checkpoint or was trained on another base model.
    """
    folder, facts = Path(checkpoint), {}
    if checkpoint != BASE:
        try:
            facts = json.loads((folder / "ds_lora.json").read_text(encoding="utf-8"))
            peft = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            cfg = dataclasses.replace(
                cfg,
                lora_r=facts["r"],
                lora_alpha=facts["alpha"],
                lora_target_modules=peft["target_modules"],
                num_frozen_layers=min(peft["layers_to_transform"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--checkpoint {folder} is no stage checkpoint ({error!r}): give a folder such as "
                "checkpoints/seq_T5_safety, or base"
            ) from error
    check_model(cfg)
    about = describe_base(cfg)
    known = {key: facts[key] for key in about if key in facts}
    if told := differences(known, {key: about[key] for key in known}):
        raise UserError(f"--checkpoint {folder} has another base model ({told}): give its own")
    device = select_device(cfg.device)
    model = inject(cfg, load_model(cfg, device))
    session = Session(cfg, model, load_tokenizer(cfg), device, {}, about, None, {}, StopSignals())
    stage = Stage(BASE, "seq_lora", session, Router())
    if checkpoint != BASE:
        stage.take_up(folder)
    return stage
