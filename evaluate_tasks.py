"""What a stage checkpoint, or the base model, says: greedy answers, scored from 0 to 100.

To the held-out samples of every task in --task_order and, with --benchmarks, to public benchmarks.
"""

import dataclasses
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Subset

from configs.base_config import UserError, command_line, knob, parse_config
from models.ds_lora import BRANCHES, branches_restored, load_adapter, reset_branch
from utils_benchmarks import benchmark_questions, held_out_questions
from utils_checkpoint import NoLog, write_json_lines
from utils_data import TaskData, prepare_task, read_jsonl
from utils_distributed import is_first, joined
from utils_generate import ask
from utils_metrics import format_scores
from utils_readings import BASE, LATEST, READINGS, Stage, open_stage, readings_of
from utils_train import evaluate_loss, seed_torch, train_task

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


@command_line
def main(argv=None):
    cfg, wanted = parse_config(argv, Evaluation, description=__doc__)
    cfg = dataclasses.replace(
        cfg, eval_samples_per_task=wanted.max_samples or cfg.eval_samples_per_task
    )
    with joined():
        asked = held_out_questions(cfg, cfg.task_order)
        if wanted.benchmarks:
            asked += benchmark_questions(wanted.benchmarks, wanted.max_samples)
        stage = open_stage(cfg, wanted.checkpoint)
        check(stage, wanted.branches, [questions.name for questions in asked])
        with stage.session.stop.installed():
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
            if wanted.recovery:
                recover(stage)


def answers_path(stage: Stage, name: str) -> Path:
    """Where the answers of `stage` to the questions `name` are kept."""
    return Path(stage.session.cfg.log_dir) / f"gen_{stage.name}_{name}.jsonl"


def scores_path(stage: Stage) -> Path:
    """Where the scores of `stage` are kept."""
    return Path(stage.session.cfg.log_dir) / f"scores_{stage.name}.jsonl"


def check(stage: Stage, readings: list[str], names: list[str]) -> None:
    """Raises `UserError` with all that stands in the way."""
    cfg, problems = stage.session.cfg, []
    possible = readings_of(stage.method, cfg.num_frozen_layers)
    for reading in readings:
        if reading not in possible:
            problems.append(
                f"--branches {reading}: a model trained by {stage.method} is read as "
                f"{', '.join(possible)}"
            )
        elif READINGS[reading].own:
            missing = [t for t in cfg.task_order if not (Path(cfg.save_dir) / f"seq_{t}").is_dir()]
            if missing:
                problems.append(
                    f"--branches {reading} needs the checkpoints of {', '.join(missing)} in "
                    f"{cfg.save_dir}: finish the run, or leave them out of --task_order"
                )
        if READINGS.get(reading, READINGS[LATEST]).is_routed and not stage.router.tasks:
            problems.append(f"--branches {reading}: the checkpoint has no router.safetensors")
    paths = [scores_path(stage), *(answers_path(stage, name) for name in names)]
    found = [str(path) for path in paths if path.exists()]
    if found and not cfg.overwrite:
        problems.append(
            f"{found[0]} and {len(found) - 1} more are there already: give --overwrite true to "
            "replace them, or another --log_dir"
        )
    if problems:
        raise UserError("\n".join(problems))


def recover(stage: Stage) -> None:
    """Logs how much of what was lost comes back with a few samples of each earlier task.

    A copy of the branches is trained for RECOVERY_STEPS on RECOVERY_SAMPLES of it, and so are new
    branches on the base. What so little teaches the one and not the other was not lost: its
    forgetting was illusory.
    """
    cfg = dataclasses.replace(
        stage.session.cfg,
        method=stage.method,
        num_epochs=RECOVERY_STEPS,
        max_steps_per_task=RECOVERY_STEPS,
        logging_steps=RECOVERY_STEPS,
    )
    order, lines = cfg.task_order, []
    for task in order[: order.index(stage.name)] if stage.name in order else []:
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
