"""What a stage checkpoint, or the base model, says: greedy answers, scored from 0 to 100.

To the held-out samples of every task in --task_order and, with --benchmarks, to public benchmarks.
"""

import contextlib
import dataclasses
import random
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from configs.command_line import Knobs, NothingToDo, UserError, is_first, knob, value_of_option
from configs.ending import command_line
from evaluation.generate import ask
from evaluation.likelihood import by_likelihood
from evaluation.matrix import format_scores
from evaluation.questions import Questions, benchmark_questions, held_out_questions
from evaluation.readings import BASE, LATEST, READINGS, Stage, open_stage, read_as
from evaluation.unfinished import Unfinished, ingredients
from methods import parse_config
from models.ds_lora import BRANCHES, branches_restored, reset_branch
from training.logs import NoLog
from training.loop import TaskTraining, evaluate_loss
from training.processes import all_succeed, joined
from training.saving import run_lock, write_json_lines
from utils_data import prepare_task, read_task, split_task

RECOVERY_STEPS = 20
RECOVERY_SAMPLES = (10, 50)


@dataclass
class Evaluation(Knobs):
    checkpoint: str = knob(BASE, "a stage checkpoint, such as checkpoints/seq_TASK; or base")
    branches: list[str] = knob([LATEST], f"readings, out of {', '.join(READINGS)}", not_empty=True)
    max_samples: int = knob(
        0, "questions a task or benchmark; 0: eval_samples_per_task, or all", at_least=0
    )
    max_new_tokens: int = knob(
        0, "tokens of an answer at most; 0: by task, 128 to 256", at_least=0, at_most=10**5
    )
    benchmarks: str = knob("", "folder of gsm8k/, mbpp/, bfcl/, xstest/, safety-tuned-llamas/")
    recovery: bool = knob(
        False, "train copies of the branches on a few samples of each earlier task, score the loss"
    )


@command_line
def main(argv=None):
    cfg, wanted = parse_config(argv, Evaluation, description=__doc__)
    if wanted.max_samples:
        cfg = dataclasses.replace(cfg, eval_samples_per_task=wanted.max_samples)
    given = list(sys.argv[1:] if argv is None else argv)
    with contextlib.ExitStack() as stack:
        stack.enter_context(joined())
        stage = open_stage(cfg, wanted.checkpoint)
        # Those that it was trained on, unless others were asked for.
        asks = value_of_option(given, "--task_order") is not None
        questions = [questions_of(stage, task) for task in (cfg if asks else stage.cfg).task_order]
        if wanted.benchmarks:
            questions += benchmark_questions(wanted.benchmarks, wanted.max_samples)
        check(stage, wanted, questions)
        lock = run_lock([cfg.log_dir], f"scores_{stage.name}")
        all_succeed([partial(stack.enter_context, lock)] if is_first() else [])
        all_succeed([partial(check_not_scored, stage)])
        if cfg.dry_run:
            numbers = ", ".join(f"{len(kind.rows)} of {kind.name}" for kind in questions)
            raise NothingToDo(f"dry run: {numbers} would be asked of {stage.name}")
        stack.enter_context(stage.passes.stop.installed())
        begun = log_path(stage, "scores", "unfinished")
        unfinished = Unfinished(begun, ingredients(stage, wanted, questions), cfg.overwrite)
        if is_first():
            # From here on the same command without --overwrite goes on.
            log_path(stage, "scores").unlink(missing_ok=True)
        scores = evaluate(stage, wanted, questions, unfinished)
        if wanted.recovery:
            recover(stage, unfinished)
        if is_first():
            write_json_lines(log_path(stage, "scores"), scores)
        unfinished.finish()


def questions_of(stage: Stage, task: str) -> Questions:
    """The held-out rows of `task`; held out is what the training of `stage` held out."""
    if task not in stage.cfg.data_paths:
        raise UserError(
            f"{task}: the checkpoint does not say its files; give --task_data {task}=FILE"
        )
    train, held_out = split_task(stage.cfg, *read_task(stage.cfg, task))
    outputs = [row["output"] for row in train]
    return held_out_questions(stage.cfg, task, held_out, outputs)


def evaluate(
    stage: Stage, wanted: Evaluation, all_questions: list[Questions], unfinished: Unfinished
) -> list[dict]:
    """Asks everything in every reading, keeps the answers, and prints and returns the scores."""
    scores = []
    for questions in all_questions:
        path = log_path(stage, "gen", questions.name)
        done = unfinished.part(questions.name, path)
        if done:
            print(f"{questions.name}: answered before")
            scores += done["scores"]
            continue
        lines, of_questions = [], []
        for reading in wanted.branches:
            found, of_reading = ask(stage, reading, questions, wanted.max_new_tokens)
            lines += found
            of_questions += of_reading + by_likelihood(stage, reading, questions)
        if is_first():
            write_json_lines(path, lines)
        unfinished.keep(questions.name, path, scores=of_questions)
        scores += of_questions
    if is_first():
        print(format_scores(scores))
    return scores


def log_path(stage: Stage, kind: str, name: str = "") -> Path:
    """Where the "gen" (answers to the questions `name`), "recovery" or "scores" of `stage` are.

    The scores are written last.
    """
    ending = f"_{name}" if name else ""
    return Path(stage.cfg.log_dir) / f"{kind}_{stage.name}{ending}.jsonl"


def check(stage: Stage, wanted: Evaluation, all_questions: list[Questions]) -> None:
    """Raises `UserError` with all that stands in the way."""
    cfg, problems, needed = stage.cfg, [], {}
    for name in wanted.branches:
        if name not in stage.readings:
            problems.append(
                f"--branches {name}: {stage.name} of {stage.method.name} is read as "
                f"{', '.join(stage.readings)}"
            )
        elif READINGS[name].is_routed:
            needed[name] = stage.router.tasks
            if not stage.router.tasks:
                problems.append(f"--branches {name}: the checkpoint has no router.safetensors")
        elif READINGS[name].own:
            needed[name] = list(dict.fromkeys(questions.task for questions in all_questions))
            for task in [task for task in needed[name] if task not in stage.seen]:
                problems.append(
                    f"--branches {name}: {stage.name} comes before {task} was learned; leave it "
                    "out of --task_order"
                )
    problems += [
        f"{questions.name}: no question is left; holdout_fraction is {cfg.holdout_fraction}"
        for questions in all_questions
        if not questions.rows
    ]
    if wanted.recovery:
        needed["recovery"] = stage.seen[:-1]
        if stage.name not in stage.seen or not stage.seen[:-1]:
            problems.append(f"--recovery: no task was learned before {stage.name}")
    for name, tasks in needed.items():
        missing = [task for task in tasks if not stage.folder_of(task).is_dir()]
        if missing:
            problems.append(
                f"{name} needs the checkpoints of {', '.join(missing)} in {cfg.save_dir}"
            )
    folder = Path(cfg.log_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problems.append(f"--log_dir {folder} cannot be written: {error.strerror}")
    if problems:
        raise UserError("\n".join(problems))


def check_not_scored(stage: Stage) -> None:
    """Raises `UserError` where `stage` has its scores already, and they are not to be replaced."""
    path = log_path(stage, "scores")
    # Both are there where it was killed between writing its scores and its end: it goes on.
    was_killed = log_path(stage, "scores", "unfinished").exists()
    if path.exists() and not was_killed and not stage.cfg.overwrite:
        raise UserError(
            f"{path} is there already: give --overwrite true to replace it and its answers, or "
            "another --log_dir"
        )


def recover(stage: Stage, unfinished: Unfinished) -> None:
    """Logs how much of what was lost comes back with a few samples of each earlier task.

    A copy of the branches is trained for RECOVERY_STEPS on RECOVERY_SAMPLES of it, and so are new
    branches on the base, for comparison. What comes back by so little was out of reach rather than
    gone: an upper bound of illusory forgetting, since a small gap closes sooner than a large one.
    """
    cfg = dataclasses.replace(
        stage.cfg,
        num_epochs=RECOVERY_STEPS,
        max_steps_per_task=RECOVERY_STEPS,
        logging_steps=RECOVERY_STEPS,
    )
    lines = []
    for task in stage.seen[:-1]:
        name = f"recovery of {task}"
        done = unfinished.part(name)
        losses = done["losses"] if done else recover_task(stage, cfg, task)
        unfinished.keep(name, losses=losses)
        lines.append({"stage": stage.name, "task": task, **losses})
        print(f"{name}: {'  '.join(f'{k} {v:.3f}' for k, v in losses.items())}")
    if is_first():
        write_json_lines(log_path(stage, "recovery"), lines)


def recover_task(stage: Stage, cfg, task: str) -> dict[str, float]:
    """Held-out losses of `task` in nats per response token, and shares that came back.

    "learned" right after its stage, "final" now, "base" untouched; "final_k" and "base_k" after
    training on k samples from there; "share_k" of final - learned and "base_share_k" of base -
    learned are what that brought back. A share is missing where nothing was lost.
    """
    passes, model = stage.passes, stage.passes.model
    data = prepare_task(cfg, passes.tokenizer, task, *read_task(cfg, task))

    def loss() -> float:
        return evaluate_loss(passes, data.held_out, f"{task} recovery")["loss"]

    def to_base() -> None:
        for branch in BRANCHES:
            reset_branch(model, branch, cfg.seed, branch, "recovery")

    found = {"final": loss()}
    with read_as(stage, "stage", task):
        found["learned"] = loss()
        to_base()
        found["base"] = loss()
    for size in RECOVERY_SAMPLES:
        chosen = random.Random(f"{cfg.seed}/{task}/recovery").sample(
            range(len(data.train)), min(size, len(data.train))
        )
        few = [data.train[i] for i in chosen]
        for start, begin in (("final", lambda: None), ("base", to_base)):
            with branches_restored(model):
                begin()
                TaskTraining(cfg, passes, task, few, NoLog("")).run()
                found[f"{start}_{size}"] = loss()
    for start, share in (("final", "share"), ("base", "base_share")):
        lost = found[start] - found["learned"]
        for size in RECOVERY_SAMPLES if lost > 0 else ():
            found[f"{share}_{size}"] = (found[start] - found[f"{start}_{size}"]) / lost
    return found


if __name__ == "__main__":
    sys.exit(main())
