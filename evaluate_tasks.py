"""What a stage checkpoint, or the base model, says: greedy answers, scored from 0 to 100.

To the held-out samples of every task in --task_order and, with --benchmarks, to public benchmarks.
"""

import dataclasses
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Subset

from configs.base_config import (
    NothingToDo,
    Stopped,
    UserError,
    command_line,
    knob,
    parse_config,
)
from models.ds_lora import BRANCHES, branches_restored, load_adapter, reset_branch
from evaluation.questions import Questions, benchmark_questions, held_out_questions
from training.saving import NoLog, write_json_lines
from utils_data import TaskData, prepare_task, read_jsonl
from training.processes import is_first, joined
from evaluation.generate import ask
from evaluation.matrix import format_scores
from evaluation.readings import BASE, LATEST, READINGS, Stage, open_stage, readings_of
from training.loop import evaluate_loss, seed_torch, train_task

RECOVERY_STEPS = 20
RECOVERY_SAMPLES = (10, 50)


@dataclass
class Evaluation:
    checkpoint: str = knob(BASE, "a stage checkpoint, such as checkpoints/seq_T5_safety; or base")
    branches: list[str] = knob([LATEST], f"readings, out of {', '.join(READINGS)}")
    max_samples: int = knob(0, "questions a task or benchmark; 0: eval_samples_per_task, or all")
    max_new_tokens: int = knob(0, "tokens of an answer at most; 0: by task, 128 to 256")
    benchmarks: str = knob("", "folder of gsm8k/, mbpp/, bfcl/, xstest/, safety-tuned-llamas/")
    recovery: bool = knob(
        False, "train copies of the branches on a few samples of each earlier task, score the loss"
    )

    def __post_init__(self):
        given = {"max_samples": self.max_samples, "max_new_tokens": self.max_new_tokens}
        problems = [
            f"--{name} {n}: give 0 or a positive number" for name, n in given.items() if n < 0
        ]
        if problems:
            raise UserError("\n".join(problems))


@command_line
def main(argv=None):
    cfg, wanted = parse_config(argv, Evaluation, description=__doc__)
    if wanted.max_samples:
        cfg = dataclasses.replace(cfg, eval_samples_per_task=wanted.max_samples)
    with joined():
        asked_tasks = cfg.task_order
        stage = open_stage(cfg, wanted.checkpoint)
        # Held out is what its training held out.
        asked = held_out_questions(stage.session.cfg, asked_tasks)
        if wanted.benchmarks:
            asked += benchmark_questions(wanted.benchmarks, wanted.max_samples)
        check(stage, wanted, asked)
        if cfg.dry_run:
            told = ", ".join(f"{len(of.rows)} of {of.name}" for of in asked)
            raise NothingToDo(f"dry run: {told} would be asked of {stage.name}")
        try:
            with stage.session.stop.installed():
                evaluate(stage, wanted, asked)
                if wanted.recovery:
                    recover(stage)
        except Stopped as stop:
            # Not "goes on": an evaluation begins anew.
            raise KeyboardInterrupt from stop


def evaluate(stage: Stage, wanted: Evaluation, asked: list[Questions]) -> None:
    """Asks everything in every reading, keeps the answers, and prints and keeps the scores."""
    scores = []
    for questions in asked:
        lines = []
        for reading in wanted.branches:
            found, of_reading = ask(stage, reading, questions, wanted.max_new_tokens)
            lines += found
            scores += of_reading
        if is_first():
            write_json_lines(answers_path(stage, questions.name), lines)
    if is_first():
        write_json_lines(scores_path(stage), scores)
        print(format_scores(scores))


def answers_path(stage: Stage, name: str) -> Path:
    """Where the answers of `stage` to the questions `name` are kept."""
    return Path(stage.session.cfg.log_dir) / f"gen_{stage.name}_{name}.jsonl"


def scores_path(stage: Stage) -> Path:
    """Where the scores of `stage` are kept; written last."""
    return Path(stage.session.cfg.log_dir) / f"scores_{stage.name}.jsonl"


def check(stage: Stage, wanted: Evaluation, asked: list[Questions]) -> None:
    """Raises `UserError` with all that stands in the way."""
    cfg, problems = stage.session.cfg, []
    possible = readings_of(stage.method, cfg.num_frozen_layers)
    needed = {}
    for name in wanted.branches:
        if name not in possible:
            problems.append(
                f"--branches {name}: a model trained by {stage.method} is read as "
                f"{', '.join(possible)}"
            )
        elif READINGS[name].is_routed:
            needed[name] = stage.router.tasks
            if not stage.router.tasks:
                problems.append(f"--branches {name}: the checkpoint has no router.safetensors")
        elif READINGS[name].own:
            needed[name] = list(dict.fromkeys(questions.task for questions in asked))
            for task in [task for task in needed[name] if task not in stage.seen]:
                problems.append(
                    f"--branches {name}: {stage.name} comes before {task} was learned; leave it "
                    "out of --task_order"
                )
    if wanted.recovery:
        needed["recovery"] = stage.seen[:-1]
        if stage.name not in stage.seen or not stage.seen[:-1]:
            problems.append(f"--recovery: no task was learned before {stage.name}")
    for name, tasks in needed.items():
        missing = [task for task in tasks if not (Path(cfg.save_dir) / f"seq_{task}").is_dir()]
        if missing:
            problems.append(
                f"{name} needs the checkpoints of {', '.join(missing)} in {cfg.save_dir}"
            )
    path = scores_path(stage)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        problems.append(f"--log_dir {path.parent} cannot be written: {error.strerror}")
    if path.exists() and not cfg.overwrite:
        problems.append(
            f"{path} is there already: give --overwrite true to replace it and its answers, or "
            "another --log_dir"
        )
    if problems:
        raise UserError("\n".join(problems))


def recover(stage: Stage) -> None:
    """Logs how much of what was lost comes back with a few samples of each earlier task.

    A copy of the branches is trained for RECOVERY_STEPS on RECOVERY_SAMPLES of it, and so are new
    branches on the base, for comparison. What comes back by so little was out of reach rather than
    gone: an upper bound of illusory forgetting, since a small gap closes sooner than a large one.
    """
    cfg = dataclasses.replace(
        stage.session.cfg,
        num_epochs=RECOVERY_STEPS,
        max_steps_per_task=RECOVERY_STEPS,
        logging_steps=RECOVERY_STEPS,
    )
    lines = []
    for task in stage.seen[:-1]:
        lines.append({"stage": stage.name, "task": task, **recover_task(stage, cfg, task)})
        told = "  ".join(f"{k} {v:.3f}" for k, v in lines[-1].items() if isinstance(v, float))
        print(f"recovery of {task}: {told}")
    if is_first():
        write_json_lines(Path(cfg.log_dir) / f"recovery_{stage.name}.jsonl", lines)


def recover_task(stage: Stage, cfg, task: str) -> dict[str, float]:
    """Held-out losses of `task` in nats per response token, and shares that came back.

    "learned" right after its stage, "final" now, "base" untouched; "final_k" and "base_k" after
    training on k samples from there; "share_k" of final - learned and "base_share_k" of base -
    learned are what that brought back. A share is missing where nothing was lost.
    """
    session = stage.session
    data = prepare_task(cfg, session.tokenizer, task, read_jsonl(cfg.data_path(task)))

    def loss() -> float:
        return evaluate_loss(session, data.held_out, f"{task} recovery")["loss"]

    def to_base() -> None:
        for branch in BRANCHES:
            seed_torch(cfg.seed, branch, "recovery")
            reset_branch(session.model, branch)

    found = {"final": loss()}
    with branches_restored(session.model):
        load_adapter(session.model, Path(cfg.save_dir) / f"seq_{task}")
        found["learned"] = loss()
        to_base()
        found["base"] = loss()
    for size in RECOVERY_SAMPLES:
        chosen = random.Random(f"{cfg.seed}/{task}/recovery").sample(
            range(len(data.train)), min(size, len(data.train))
        )
        session.data[task] = TaskData(Subset(data.train, chosen), data.held_out)
        for start, begin in (("final", lambda: None), ("base", to_base)):
            with branches_restored(session.model):
                begin()
                train_task(cfg, session, task, NoLog(""))
                found[f"{start}_{size}"] = loss()
    for start, share in (("final", "share"), ("base", "base_share")):
        lost = found[start] - found["learned"]
        for size in RECOVERY_SAMPLES if lost > 0 else ():
            found[f"{share}_{size}"] = (found[start] - found[f"{start}_{size}"]) / lost
    return found


if __name__ == "__main__":
    sys.exit(main())
