"""The readings of a trained model: which branches answer a sample, and what their loss is."""

import contextlib
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Subset

from configs.base_config import UserError
from models.ds_lora import BRANCHES, branch_off, branches_restored, load_adapter
from models.forward import evaluation
from models.router import Router, prompt_feature
from models.slsd import everywhere
from utils_distributed import gather
from utils_train import evaluate_loss

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


# What "latest" loses against "own" is access, not knowledge; "fast" and "stage" are controls.
LATEST = "latest"
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


def evaluate_reading(
    session, method: str, reading: str, task: str, router: Router, description: str
) -> tuple[dict, dict[str, int]]:
    """({"loss": nats per response token, "tokens"}, task -> samples answered as that task).

    Over the held-out samples of `task`.
    """
    samples, parts = session.data[task].held_out, []
    sources = sources_of(session, reading, task, samples, router)
    for source, chosen in sources.items():
        with read_as(session, method, reading, source):
            parts.append(evaluate_loss(session, Subset(samples, chosen), description))
    tokens = sum(part["tokens"] for part in parts)
    loss = sum(part["loss"] * part["tokens"] for part in parts) / tokens
    return (
        {"loss": loss, "tokens": tokens},
        {source: len(chosen) for source, chosen in sources.items()},
    )
